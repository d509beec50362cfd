"""What of a data set a policy gets to see: which cameras, at which size, and which features as state and action."""

from pathlib import Path

from vla import InputError, hub
from vla.data.layout import Layout, read_layout

MOST_NUMBERS = 10_000  # of a frame; more are a mistake in the metadata
# Features by convention, of LeRobot and of openpi.
STATE, ACTION = ("observation.state", "state"), ("action", "actions")


class Selection:
    """Part of a data set, of which only the metadata have been read.

    root: the data set's folder, or owner/name on the Hugging Face hub. name: what it is called (the folder's name).
    cameras: those wanted, in this order, by short name ("table" for "observation.images.table") or feature; all by
    default. rename: short name or feature -> another name. some_cameras: it may lack some of `cameras`. state, action:
    features, whose numbers are joined; by default those that convention names. image_size: (h, w) to bring all
    pictures to, aspect kept; by default their own.
    Raises InputError if the data set has no such cameras or features.

    Attributes: name (of the data set), layout, own_cameras (its names for all that it has), cameras (features by the
    chosen names), state, action (features), state_names, action_names (of each number).
    """

    def __init__(
        self,
        root: str | Path,
        *,
        name: str = "",
        cameras: tuple[str, ...] = (),
        rename: dict[str, str] | None = None,
        some_cameras: bool = False,
        state: tuple[str, ...] = (),
        action: tuple[str, ...] = (),
        image_size: tuple[int, int] | None = None,
    ):
        self.name = name or hub.dataset_name(root)
        self.layout = layout = read_layout(hub.dataset(root))
        short = {
            key: key.removeprefix("observation.").removeprefix("images.").removeprefix("image.")
            for key in layout.cameras()
        }
        self.own_cameras = tuple(short.values())
        self.cameras = _chosen(layout, short, cameras, rename or {}, some_cameras)
        self._image_size = image_size
        self.state, self.action = state or _conventional(layout, STATE), action or _conventional(layout, ACTION)
        self.state_names, self.action_names = _names(layout, self.state), _names(layout, self.action)

    @property
    def image_size(self) -> tuple[int, int]:
        """(h, w) of training. Raises InputError if the cameras have several and none was given."""
        sizes = {name: self.layout.image_size(key) for name, key in self.cameras.items()}
        if self._image_size is None and len(set(sizes.values())) > 1:
            raise InputError(
                f"{self.layout.root}: cameras have sizes {sizes}, expected one size: give --data.image_size, or choose "
                "with --data.cameras"
            )
        return self._image_size or next(iter(sizes.values()))


def _chosen(
    layout: Layout, short: dict[str, str], wanted: tuple[str, ...], rename: dict[str, str], some: bool
) -> dict[str, str]:
    keys = list(short)
    available = {rename.get(key, rename.get(short[key], short[key])): key for key in keys}
    if len(available) < len(keys):
        raise InputError(
            f"{layout.root}: cameras {keys} have names in common, {list(available)}: rename one, such as "
            f"--data.camera_map {max(keys, key=len)}=other"
        )
    names = {**{key: key for key in keys}, **available}
    asked = [name for name in wanted or available if name in names]
    chosen = {name: names[name] for name in asked}
    if len(set(chosen.values())) < len(asked):
        raise InputError(
            f"{layout.root}: --data.cameras {' '.join(wanted)} names a camera twice: drop one of its names"
        )
    if not chosen or (len(chosen) < len(wanted) and not some):
        expected = list(wanted) or "at least one (a feature of dtype image or video)"
        raise InputError(f"{layout.root} has cameras {list(available)}, expected {expected}: correct --data.cameras")
    return chosen


def _conventional(layout: Layout, names: tuple[str, ...]) -> tuple[str, ...]:
    return next(((name,) for name in names if name in layout.features), names[:1])


def _names(layout: Layout, keys: tuple[str, ...]) -> tuple[str, ...]:
    names = []
    for key in keys:
        feature = layout.features.get(key, {})
        shape = feature.get("shape")
        numbers = shape and len(shape) == 1 and feature["dtype"] not in ("string", "language")
        if not numbers or not 1 <= shape[0] <= MOST_NUMBERS:
            found = f"{feature['dtype']} of shape {shape}" if feature else f"not among {sorted(layout.features)}"
            cure = "name other features with --data.state and --data.action"
            raise InputError(f"{layout.root}/meta/info.json: {key!r} is {found}, expected numbers of shape [D]: {cure}")
        own, dim = feature.get("names"), shape[0]
        if isinstance(own, dict) and len(own) == 1:  # {"motors": [...]}
            (own,) = own.values()
        if isinstance(own, list) and len(own) == 1 and isinstance(own[0], list):  # [[...]]
            (own,) = own
        named = isinstance(own, list) and len(own) == dim
        names += [str(name) for name in own] if named else [f"{key}_{i}" for i in range(dim)]
    return tuple(names)
