"""Where the keys of a strategy get their embeddings from. Not a strategy of its own."""

from mcit_lightning.clip_keys import CLIPKeyEncoder
from mcit_lightning.data.collate import SampleReader
from mcit_lightning.key_encoders import KeyEncoder, TowerEncoder
from mcit_lightning.stages import Stage
from mcit_lightning.strategies.base import ContinualStrategy
from mcit_lightning.towers import Towers


class KeyEncoded(ContinualStrategy):
    """Embeds images and questions as `key_encoder` of its configuration says; to be named before a method's other base.

    `key_encoder` is a CLIP checkpoint, or None for the model's own vision tower and input embeddings.
    """

    _encoder: KeyEncoder | None = None

    @property
    def reads_tower(self) -> bool:  # type: ignore[override]
        """Whether the model's own vision tower embeds the images."""
        return isinstance(self.key_encoder(), TowerEncoder)

    def check(self, towers: Towers, stages: list[Stage]) -> None:
        """Look for the targets, and load the key encoder. Raises ValueError where one of them is not there."""
        super().check(towers, stages)
        self.key_encoder()

    def key_encoder(self) -> KeyEncoder:
        """What makes the embeddings of the keys; loaded at the first call.

        Raises:
            ValueError: `key_encoder` names no CLIP model.
        """
        if self._encoder is None:
            name = self.config.key_encoder
            self._encoder = TowerEncoder() if name is None else CLIPKeyEncoder(name)
        return self._encoder

    def sample_reader(self) -> SampleReader | None:
        """What the key encoder wants to know of the samples."""
        return self.key_encoder().reader
