"""Source and solution of the Helmholtz equation."""

from datamodules.fields import FieldDataModule


class Helmholtz(FieldDataModule):
    """a: source, u: solution, 0 on the edge of the unit square (see ``equireg.pde.generate.HelmholtzLaw``)."""

    pde = "helmholtz"
