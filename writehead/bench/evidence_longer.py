"""The longer runs of the evidence: what `examples/multi30k.sh` scored, as lines of the page."""

from pathlib import Path

from writehead.bench.evidence_claims import BLEU, PERPLEXITY
from writehead.convert.strict_json import read_json

FOLDER = "multi30k"  # of the evidence, with what the script wrote
KINDS = ("multi-head", "multi-query")
WANTED = 33.0  # BLEU


def longer_page(out: Path) -> list[str]:
    """The lines of the section, with those runs that there are."""
    lines = [
        "## One write-head: longer runs",
        "",
        "One model of each kind, trained longer than the table above has time for "
        "([multi30k.sh](../../examples/multi30k.sh): 3 + 3 layers of width 192, equal parameters). "
        f"Wanted are {WANTED:g} BLEU of both.",
        "",
    ]
    found = {kind: out / FOLDER / f"{kind}.json" for kind in KINDS}
    there = {kind: read_json(path) for kind, path in found.items() if path.exists()}
    if not there:
        return [*lines, "Not run yet: `examples/multi30k.sh DATA OUT`."]
    lines += ["| attention | BLEU | ln PPL | sentences | search | commit |", "|---|---:|---:|---:|---|---|"]
    for kind, said in there.items():
        scores = f"{said['bleu']:.2f} | {said['ln_perplexity']:.3f} | {said['sentences']} of test 2016"
        commit = (said["machine"]["commit"] or "unknown")[:10]
        lines.append(f"| {kind} | {scores} | {said['search']} | {commit} |")
    verdict = "holds" if min(said["bleu"] for said in there.values()) >= WANTED else "**does not hold**"
    some = "" if len(there) == len(KINDS) else f" (of {len(there)} of {len(KINDS)} so far)"
    lines += ["", f"- At least {WANTED:g} BLEU: {verdict}{some}."]
    if len(there) == len(KINDS):
        heads, shared = (there[kind] for kind in KINDS)
        bleu = BLEU.better(shared["bleu"], heads["bleu"])
        perplexity = PERPLEXITY.better(shared["ln_perplexity"], heads["ln_perplexity"])
        differences = f"{bleu:+.2f} BLEU, {perplexity:+.2f} % perplexity"
        lines.append(
            f"- Multi-query against multi-head (plus is better): {differences}. {BLEU.verdict(bleu)}"
        )
    signature = next(iter(there.values()))["signature"]
    return [*lines, f"- BLEU: lower-cased, sacreBLEU `{signature}`; one seed."]
