"""What the layers of one `ArkCache` share: settings, managers, the attachment.

Layers refer to this and never to their cache, so that a cache and the host memory behind it are
freed as soon as the last reference to the cache goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import ReferenceType

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from arkcache.config import CacheConfig
from arkcache.errors import ConfigError, InputError
from arkcache.huggingface.attachment import Attachment, LayerShape, find_attachment
from arkcache.lending import Loans
from arkcache.manager import KVCacheManager
from arkcache.tracing.recorder import Recorder


@dataclass(eq=False)
class CacheCore:
    """Shared by the layers of a cache.

    Attributes:
        config: the user's settings, for layers numbered as in the model.
        model_config: the model's own.
        device_type: of the model's first device, "cpu", "cuda" ...
        num_paged_layers: layers of the model whose pages this keeps.
        last_readers: of layers whose keys and values others attend, the last of those.
        handed: keys and values of such layers, in the step under way, until the last has them.
        reason: why the cache is in compat mode; None when it is paged.
        mask_is_read: a layer that is not paged attends its whole past, and so needs a mask.
        attachment: of the model; None after unpickling without the model.
        model: the model itself, which the cache does not keep alive; None after unpickling.
        managers: of layers that are alike, by their shape or, where it is unknown, by layer.
        exact: every step attends everything, whatever its size: see `ArkCache.exact`.
        loans: of the device tiers of all managers.
        times_copies: see `time_copies`.
        recorder: told what decode steps do, within `traces`; see `ArkCache.trace`.
    """

    config: CacheConfig
    model_config: PreTrainedConfig
    device_type: str
    num_paged_layers: int = 0
    last_readers: dict[int, int] = field(default_factory=dict)
    handed: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    reason: str | None = None
    mask_is_read: bool = False
    attachment: Attachment | None = None
    managers: dict[LayerShape | int, KVCacheManager] = field(default_factory=dict)
    exact: bool = False
    model: ReferenceType[PreTrainedModel] | None = None
    loans: Loans = field(default_factory=Loans)
    recorder: Recorder | None = None
    traces: ExitStack | None = None
    times_copies: bool = False

    def attached(self) -> Attachment:
        """The attachment; raises `InputError` where there is none."""
        if self.attachment is None:
            raise InputError("this cache was loaded without its model: call cache.attach(model)")
        return self.attachment

    def forget_step(self) -> None:
        """Forget a step that was interrupted: its padding, and a layer not attended yet."""
        self.handed.clear()
        if self.attachment is not None:
            self.attachment.padding = self.attachment.pending = None

    def knows(self, mask: Tensor) -> bool:
        """Whether a 2D mask hides just what was padding when it was stored [batch, columns]."""
        return all(manager.has_padding(mask) for manager in self.managers.values())

    def manager_of(self, layer: int, key: Tensor, value: Tensor) -> tuple[KVCacheManager, int]:
        """The manager of a layer and the layer's number in it.

        Layers that the probe saw to be alike share one, and so one device and one host tier.
        """
        shapes = self.attached().shapes
        known = shapes.get(layer)
        shape = LayerShape.of(key, value, latent=known is not None and known.latent)
        group: LayerShape | int = shape if known == shape else layer
        members = self._members(group)
        if group not in self.managers:
            if not self.managers:
                self._check_batch(key.shape[0])
            self.managers[group] = self._make_manager(shape, members)
            self._trace(self.managers[group], members)
        return self.managers[group], members.index(layer)

    def add_manager(self, shape: LayerShape, layers: list[int]) -> KVCacheManager:
        """A new manager for these layers of the model, which have none.

        Raises `InputError` where other layers than these share a manager here.
        """
        group: LayerShape | int = shape
        if self.attachment is None or self.attachment.shapes.get(layers[0]) != shape:
            group = layers[0]
        if self._members(group) != layers:
            raise InputError(f"layers {layers} do not share a manager: {self._members(group)} do")
        self.managers[group] = self._make_manager(shape, layers)
        self._trace(self.managers[group], layers)
        return self.managers[group]

    @contextmanager
    def trace(self, recorder: Recorder) -> Iterator[None]:
        """See `ArkCache.trace`."""
        if self.recorder is not None:
            raise InputError("this cache is being traced already: one recorder at a time")
        if self.last_readers:
            raise InputError(
                f"layer_sources={self.config.layer_sources!r}: a trace has one step of each layer, "
                "and several layers attend the same one here; trace without layer_sources"
            )
        with ExitStack() as traces:
            self.recorder, self.traces = recorder, traces
            try:
                for group, manager in self.managers.items():
                    self._trace(manager, self._members(group))
                yield
            finally:
                self.recorder = self.traces = None

    def _trace(self, manager: KVCacheManager, layers: list[int]) -> None:
        """Trace these layers of the model, until `trace` ends."""
        if self.recorder is not None and self.traces is not None:
            self.traces.enter_context(manager.trace(self.recorder, layers))

    def time_copies(self, on: bool) -> None:
        """See `KVCacheManager.time_copies`; also of managers that are made later."""
        self.times_copies = on
        for manager in self.managers.values():
            manager.time_copies(on)

    def _members(self, group: LayerShape | int) -> list[int]:
        """The layers of the model that a manager holds, by its key in `managers`."""
        if isinstance(group, int):
            return [group]
        return sorted(layer for layer, shape in self._stored().items() if shape == group)

    def _stored(self) -> dict[int, LayerShape]:
        """The layers that the probe saw and that store keys and values of their own."""
        shapes = self.attached().shapes
        return {layer: shape for layer, shape in shapes.items() if self.config.stores(layer)}

    def check(self) -> None:
        """Raise `ConfigError` where the settings do not fit the layers that the probe saw."""
        if self.last_readers and self.reason is not None:
            raise ConfigError(
                f"layer_sources={self.config.layer_sources!r}: this model runs in compat mode, in "
                f"which layers do not share ({self.reason})"
            )
        shapes = self.attached().shapes
        for layer, source in enumerate(self.config.layer_sources or ()):
            own, its = shapes.get(layer), shapes.get(source)
            if own is not None and its is not None and own != its:
                raise ConfigError(
                    f"layer_sources: layer {layer} cannot attend layer {source}, which stores "
                    f"something else: expected {own}, got {its}"
                )
        self._probed_managers()

    def _check_batch(self, batch: int) -> None:
        """Raise `ConfigError` unless so many sequences fit, before any layer has stored any."""
        for manager in self._probed_managers():
            manager.check_batch(batch)

    def _probed_managers(self) -> list[KVCacheManager]:
        """An empty manager for each group of layers that the probe saw."""
        shapes = set(self._stored().values())
        return [self._make_manager(shape, self._members(shape)) for shape in shapes]

    def _make_manager(self, shape: LayerShape, layers: list[int]) -> KVCacheManager:
        manager = KVCacheManager(
            len(layers),
            shape.num_kv_heads,
            shape.head_dim,
            self._config_of(layers),
            device=shape.device,
            dtype=shape.dtype,
            value_dim=shape.value_dim,
            latent=shape.latent,
        )
        manager.time_copies(self.times_copies)
        return manager

    def _config_of(self, layers: list[int]) -> CacheConfig:
        """The settings of a manager that holds these layers of the model."""
        share, own = self._share(layers), self.config
        device, host, resident = (
            None if limit is None else max(1, int(limit * share))
            for limit in (own.device_bytes, own.host_bytes, own.host_resident_bytes)
        )
        config = replace(own, device_bytes=device, host_bytes=host, host_resident_bytes=resident)
        return config.of_layers(layers)

    def set_budget(self, budget_tokens: Any) -> None:
        """See `ArkCache.set_budget`."""
        config = replace(self.config, budget_tokens=budget_tokens)
        self._change(config, lambda manager, own: manager.set_budget(own.budget_tokens))

    @property
    def tier_bytes(self) -> int | None:
        """See `Resizable`: of all managers together."""
        if not self.managers:
            return self.config.device_bytes
        return sum(manager.tier_bytes or 0 for manager in self.managers.values())

    def change_size(self, device_bytes: int | None) -> None:
        """See `Resizable`; each manager has its share, as from the beginning."""
        config = replace(self.config, device_bytes=device_bytes)
        if self.attachment is not None:
            replace(self, config=config, managers={})._check_batch(1)
        for group, manager in self.managers.items():
            own = replace(self, config=config)._config_of(self._members(group))
            manager.planner.within(own.device_bytes).pages_that_fit(max(1, manager.batch))
        self._change(config, lambda manager, own: manager.change_size(own.device_bytes))

    def _change(
        self, config: CacheConfig, change: Callable[[KVCacheManager, CacheConfig], None]
    ) -> None:
        """Take over settings, and have every manager change to its own, all of them or none."""
        before, changed = self.config, list[tuple[KVCacheManager, CacheConfig]]()
        self.config = config
        try:
            for group, manager in self.managers.items():
                own = manager.config
                change(manager, self._config_of(self._members(group)))
                changed.append((manager, own))
        except BaseException:
            self.config = before
            for manager, own in changed:
                change(manager, own)
            raise

    def _share(self, layers: list[int]) -> float:
        """What these layers keep of a token in tiers, as a share of what all paged layers keep."""
        known = self._stored()
        if not all(layer in known for layer in layers):  # the probe did not get so far
            return len(layers) / max(self.num_paged_layers, len(layers))

        def size(layer: int) -> int:
            of, tiered = known[layer], self.config.budget_of(layer) is not None
            return tiered * of.num_kv_heads * (of.head_dim + of.value_dim) * of.dtype.itemsize

        own, total = sum(map(size, layers)), sum(map(size, known))
        return own / total if own else 1.0

    def __getstate__(self) -> dict[str, Any]:
        """The attachment by name: it belongs to the model, which stays behind."""
        state = dict(vars(self))
        state["model"] = None
        state["attachment"] = None if self.attachment is None else self.attachment.name
        state["recorder"] = state["traces"] = None  # a copy is not traced
        state["handed"] = {}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.attachment = find_attachment(state["attachment"])


def last_readers(sources: tuple[int, ...] | None) -> dict[int, int]:
    """Of the layers that others attend, by number, the last of those."""
    return {source: layer for layer, source in enumerate(sources or ()) if layer != source}
