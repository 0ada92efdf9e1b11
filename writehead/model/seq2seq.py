"""A decoder that reads an encoder: translation, summaries."""

from torch import Tensor, nn

from writehead.config import ModelConfig
from writehead.core.slots import Store
from writehead.mixer import Aux
from writehead.model.decoder import Decoder, DecodeState
from writehead.model.encoder import Encoder
from writehead.stacks.residual import merge_aux


class Seq2Seq(nn.Module):
    """The model that a config of kind "seq2seq" describes; encoder and decoder share their embeddings."""

    def __init__(self, config: ModelConfig) -> None:
        """Make the model with fresh weights.

        Raises:
            ValueError: a config whose parts do not fit together.
        """
        super().__init__()
        if config.kind != "seq2seq" or config.encoder is None:
            raise ValueError(f"this config describes a {config.kind}; Seq2Seq builds seq2seq models")
        self.config = config
        self.encoder = Encoder(config.encoder)
        self.decoder = Decoder(config, self.encoder.embedding.table)

    def read(self, source: Tensor, store: Store = Store()) -> tuple[DecodeState, Aux]:
        """Encode sources (R, S), -1 = padding: the state of R decoder rows that have said nothing yet."""
        x, pos, aux = self.encoder(source)
        memories = tuple(block.cross.remember(x, pos) for block in self.decoder.blocks)
        return self.decoder.init_state(len(source), store, memories), aux

    def step(self, tokens: Tensor, state: DecodeState) -> tuple[Tensor, DecodeState]:
        """As `Decoder.step`."""
        return self.decoder.step(tokens, state)

    def whole(self, source: Tensor, target: Tensor) -> tuple[Tensor, Aux]:
        """source (B, S), target (B, T) -> the decoder's last layer (B, T, X) and auxiliary values."""
        x, pos, aux = self.encoder(source)
        memories = tuple(block.cross.remember(x, pos) for block in self.decoder.blocks)
        x, more = self.decoder.whole(target, memories)
        return x, merge_aux(aux, more)

    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Aux]:
        """Training and scoring: source (B, S), target (B, T) -> logits (B, T, V) and auxiliary values."""
        x, aux = self.whole(source, target)
        return self.decoder.logits(x), aux
