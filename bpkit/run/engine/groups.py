"""The groups of a mesh to which a rank belongs, each with a transport of its own."""

from bpkit.plan.mesh import Mesh
from bpkit.run.transports.comm import Comm


class Groups:
    """One rank's transports: of all ranks, and along the data and the tensor axis.

    An axis that spans the mesh shares the transport of all ranks; along an axis of one, the group is this rank alone,
    and a sum over it changes nothing.  Groups are made once a mesh, on all ranks, and kept for as long as the workers
    live.

    Attributes
    ----------
    world, data, tensor : Comm
    """

    def __init__(self, comm: Comm, mesh: Mesh) -> None:
        self.world = comm
        self.data, self.tensor = (self._along(mesh, axis) for axis in ("data", "tensor"))

    def _along(self, mesh: Mesh, axis: str) -> Comm:
        return self.world if getattr(mesh, axis) == mesh.size else self.apart(mesh, axis)

    def apart(self, mesh: Mesh, axis: str, use: str = "") -> Comm:
        """A transport along an axis, one for each use.

        What runs inside an action needs its own: posted communication starts when its stream is free, which may be
        before that action on one rank and after it on another.
        """
        key = ("group", mesh, axis, use)
        if key not in self.world.cache:
            groups = sorted({mesh.group(rank, axis) for rank in range(mesh.size)})
            self.world.cache[key] = self.world.group(groups)
        group: Comm = self.world.cache[key]
        return group
