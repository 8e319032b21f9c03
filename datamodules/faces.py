"""The grey faces that the bundled prior was trained on."""

from datamodules.packed import Packed


class Faces(Packed):
    """Aligned grey face crops, 64x64: 11 461 to train, 935 to validate, 396 to test, no person in two of them.

    From github.com/muxspace/facial_expressions (Apache-2.0), reduced from 350 pixels with Lanczos.
    """
