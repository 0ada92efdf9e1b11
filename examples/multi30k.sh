#!/bin/sh
# multi30k.sh DATA OUT: train multi-query and multi-head translation models of one size, and score both.
# DATA holds multi30k.en-de.{train,val,test_2016_flickr}.tsv.gz, lines of English, a tab and German. What was
# stopped goes on when the script is called again. BLEU needs: pip install writehead[translate]
set -eu
data=$1 out=$2
here=$(dirname "$0")
python=${PYTHON:-python}
for kind in ${KINDS:-multi-query multi-head}; do
    over="model.depth=3"
    if [ "$kind" = multi-head ]; then
        over="model.mixer.kv_heads=8 model.cross.kv_heads=8 model.encoder.mixer.kv_heads=8
            model.feedforward.hidden=768 model.encoder.feedforward.hidden=768"
    fi
    # shellcheck disable=SC2086
    $python -m writehead train "$here/multi30k.yaml" $over \
        "data.train=[$data/multi30k.en-de.train.tsv.gz]" "data.valid=[$data/multi30k.en-de.val.tsv.gz]" \
        --out "$out/$kind" --resume auto --threads "${THREADS:-1}"
    $python -m writehead evaluate "$out/$kind" "$data/multi30k.en-de.test_2016_flickr.tsv.gz" \
        --num-beams 4 --lowercase --json --threads "${THREADS:-1}" > "$out/$kind.json"
    cat "$out/$kind.json"
done
