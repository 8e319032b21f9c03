"""Initial and final vorticity of the forced Navier-Stokes flow."""

from datamodules.fields import FieldDataModule


class NavierStokes(FieldDataModule):
    """a: vorticity at time 0, u: vorticity at time 1, on the torus (see ``equireg.pde.generate.NavierStokesLaw``)."""

    pde = "navier_stokes"
