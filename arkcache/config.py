"""The settings of a cache: one frozen dataclass, checked when it is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from math import inf
from typing import TYPE_CHECKING, Any

from arkcache.errors import ConfigError
from arkcache.formats import BITS, PRESETS, PageFormat

if TYPE_CHECKING:
    from arkcache.methods import Retention

INDEXES = (
    "cuboid-mean",
    "cuboid-max",
    "cuboid-center",
    "sphere-mean",
    "sphere-max",
    "sphere-center",
    "centroid",
    "tokens",
)
"""Page indexes by name: ArkVale's bounding volumes (section 5.2) and the low-bit token index."""

MASS_INDEXES = ("tokens",)
"""Those of `INDEXES` that rate the attention mass of a page; the others bound a logit of it."""

GROUP_REDUCTIONS = ("softmax-mean", "raw-mean")
"""How the query heads of one KV head agree on pages by their scores alone; "raw-mean" is ArkVale's
released code."""

SHARE_MEAN = "share-mean"
"""How they agree by the share of all attention that a page holds."""

GROUPINGS = ("similar",)
"""Which tokens may share a page, where it is not those that came one after another."""

ROTATIONS = ("none", "keys", "values", "both")
"""What a Hadamard rotation is applied to before it is quantised."""

BACKENDS = ("auto", "torch", "triton", "numba")
"""What a decode step may run on."""

TINY_PAGE = 4
SMALL_PAGE = 8
GROUP_PAGE = 32
"""Tokens of a page where its keys share no scales at all; where their copies in the index do; and
KIVI's group, where the keys themselves do."""

DEFAULT_BUDGET = 2048
PACKED_INDEX_BITS = 2
NO_LIMIT = 1 << 40
"""More pages or tokens than anything holds."""

LayerBudget = int | str | tuple[int | str, ...] | None
Budget = LayerBudget | tuple[LayerBudget, ...]


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """What a cache keeps where, and how much of it a decode step attends.

    All sizes are in tokens unless the name says bytes. Raises `ConfigError` (a `ValueError`) for
    a value that is impossible and for an unknown name.

    Args:
        page_size: tokens per page, the unit of selection, recall and eviction (ArkVale uses 32).
            None: 32 where keys are quantised, because a page's keys share scales per channel.
            Otherwise what `on` makes of it when the device is known: 4 on a CPU, whose token index
            has a scale for every token, 8 elsewhere.
        budget_tokens: tokens that each KV head attends in a decode step, sinks and recent window
            included. None is unlimited: everything is attended and stays in the device tier. A
            tuple gives one budget per layer; a tuple of tuples one per layer and KV head. "auto" is
            2048 or, beside `device_bytes`, as many as fit. The window grows by up to a page before
            it seals, so a budget below sinks + recent + two pages selects nothing.
        num_sink_tokens: the first tokens, always attended; rounded up to whole pages.
        num_recent_tokens: the newest tokens, always attended, never digested or quantised.
        num_dense_layers: the first layers that attend everything and stay in the device tier.
        device_pool_factor: slots for selected pages in the device tier, as a multiple of what one
            step selects. Above 1, pages that were selected a while ago need not be recalled. None:
            for the kernels of a GPU as many as 1/16 of its free memory (and `device_bytes`) has
            room for, at most 4; 1 on a CPU and on plain torch.
        key_bits, value_bits: bits per element of sealed pages, one of 16, 8, 4, 2; 16 is the
            model's dtype, untouched. `preset` sets both by name.
        group_size: channels of a value that share a scale; it must divide the value dim. Keys share
            theirs per channel, over a page's tokens (KIVI).
        rotation: one of `ROTATIONS`: keys and queries, or values and outputs, are rotated by a
            Hadamard matrix (QuaRot), which spreads outliers. Only what is quantised is rotated.
        coarse_key_bits, coarse_value_bits: a second, coarser format. Pages are sealed in the first
            and demoted, per KV head, when decode steps attend them little (LeanKV). None is no
            second format; one of them alone leaves the other at the first format's bits. Layers
            that attend everything keep the first.
        demote_below: a page is demoted when the attention that it received is below this multiple
            of an even share.
        demote_after: decode steps that a page must have been through before it may be demoted.
        packed_slots: whether quantised pages in the device tier stay packed. None: on a GPU they
            do; on a CPU they are unpacked once, when they are recalled, which is faster.
        backend: what a decode step runs on, one of `BACKENDS`. "auto": Triton kernels on a GPU,
            numba's on a CPU, where they can serve these settings and are installed, plain torch
            otherwise. "triton" and "numba" refuse settings that they do not serve; "triton" on a
            CPU needs TRITON_INTERPRET=1, for tests.
        speculative_recall: on the Triton backend, recall the pages that are rated next into spare
            places (a pool factor above 1) while later layers run.
        index: how pages are rated, one of `INDEXES`.
        index_bits: bits per key element of the token index (`index="tokens"`): 2, 4 or 8, packed,
            with scales of 32 bits per channel and page. None: 2 on a GPU; on a CPU, whose pages are
            smaller, 4 of rotated keys with a scale of 32 bits per token.
        group_reduction: how the query heads of a KV head agree on pages: `SHARE_MEAN`, the mean
            share of all their attention, so that a head which attends the sinks or the window
            leaves the choice to the others; or one of `GROUP_REDUCTIONS`. An index that rates no
            mass knows shares among pages only, and takes "softmax-mean" for it.
        estimate_pages: how many of the pages that a step does not attend it estimates, the best
            by rating, by one pseudo token each: mean key, mean value, ln(page_size) added to the
            logit (RetroInfer). 0 is none, None all. Means are kept on the device, 1/page_size of
            keys and values in the model's dtype.
        grouping: which tokens share a page. "similar": those of a KV head whose keys are alike,
            among `segment_tokens` that came one after another (ClusterKV, RetroInfer), so that
            `estimate_pages`, which it needs beside an index that rates mass, is less far off. None:
            tokens as they came. Plain torch only, see `backend`; layers that attend everything
            keep the order. See docs/grouping.md.
        segment_tokens: with a grouping, tokens that are sealed at a time: `page_size` times 2, 4,
            8 ... The window grows by so many before they are, in place of a page, and the budget
            pays for it.
        target_missed_mass: the share of its attention that a step may miss, between 0 and 1
            (Twilight's 1 - p). Each KV head then attends the fewest pages without which the index
            misses no more, the mean over its query heads, and at most those of its budget; pages
            are ordered by their share of attention, whatever `group_reduction` says. It needs an
            index that rates mass, one of `MASS_INDEXES`. None: what the budget holds. What was
            missed is in `CacheStats.missed_by_layer`.
        audit_every: in one step of so many, one layer (they take turns) reads all its keys, to
            count what its attention really missed beside what the index made of it
            (`CacheStats.missed_by_layer`). None is never. Plain torch only, see `backend`.
        layer_sources: for each layer of the model's cache the one whose keys and values it attends:
            itself, or an earlier one that attends its own (KVSharer, cross-layer attention).
            (0, 0, 2, 2) has layer 1 attend what layer 0 stores, and layer 3 what layer 2 does. Such
            a layer stores nothing and has its source's budget. None: each attends its own. Of an
            `ArkCache`; a `KVCacheManager` keeps the layers that store (docs/sharing.md).
        retention: which pages are kept for good; the others are lost, and their host memory is
            freed (docs/methods.md): an object of `arkcache.methods` such as `SnapKV(window=32)`, or
            its name in lower case. As many pages of each KV head are kept as the budget lets a step
            attend. Of a prompt everything is kept until the first step of one token after it; every
            step attends what is left then. Plain torch only. None: nothing is ever lost.
        device_bytes: bytes that the device tier may take: slots, windows and streaming block, for
            the batch at hand; budgets that need more are cut to what fits. Dense layers and the
            index grow with the context and are not part of it. None is no limit.
        host_bytes: bytes that the host tier may hold, taken at its word. An `ArkCache` divides both
            among its groups of layers of one shape. None: it may grow while the system has memory
            to spare. As it grows it looks at what is available to this process, and to every
            control group (container) around it, less a margin of a sixteenth; so all caches share
            what there is, and a context that is too long ends in `HostTierFullError`.
        host_path: a folder on a disk, in which the host tier is a file: pages are written to it and
            come back when they are recalled; RAM holds those in use. The file has no name and goes
            with the cache, unless `save` gives it one; what is saved to the same disk, or loaded
            from it, is not copied. `host_bytes` is its limit then, None what the disk has free.
            Pages are of one format, and on a GPU steps run on plain torch, as a file cannot be
            pinned.
        host_resident_bytes: with `host_path`, about how many bytes of the file may be in RAM, those
            in the system's page cache included: what is beyond is written to the disk and read
            again when it is needed. An `ArkCache` divides it as it does `host_bytes`. None: 1 GiB
            of each manager is mapped, and the page cache has more of it for as long as nothing else
            needs the memory. Without `host_path` it says nothing.
        stream_block_tokens: how many tokens of the past are in the device tier at a time while
            several new tokens attend all of it (chunked prefill, a next turn, drafted tokens). On a
            GPU there are two such blocks, so that one is read while the other is attended. None:
            1024 on a CPU; on a GPU 8192 shared by the sequences, 1024 each at least, and no more
            than an eighth of `device_bytes`.
    """

    page_size: int = None  # type: ignore[assignment]  # an int once the device is known
    budget_tokens: Budget = "auto"
    num_sink_tokens: int = 4
    num_recent_tokens: int = 32
    num_dense_layers: int = 0
    device_pool_factor: float | None = None
    key_bits: int = 16
    value_bits: int = 16
    group_size: int = 32
    rotation: str = "none"
    coarse_key_bits: int | None = None
    coarse_value_bits: int | None = None
    demote_below: float = 0.5
    demote_after: int = 64
    packed_slots: bool | None = None
    backend: str = "auto"
    speculative_recall: bool = True
    index: str = "tokens"
    index_bits: int | None = None
    group_reduction: str = SHARE_MEAN
    estimate_pages: int | None = 0
    grouping: str | None = None
    segment_tokens: int = 256
    target_missed_mass: float | None = None
    audit_every: int | None = None
    layer_sources: tuple[int, ...] | None = None
    retention: str | Retention | None = None
    device_bytes: int | None = None
    host_bytes: int | None = None
    host_path: str | None = None
    host_resident_bytes: int | None = None
    stream_block_tokens: int | None = None

    def __new__(cls, **settings: Any) -> CacheConfig:
        """Refuse unknown names."""
        # The generated __init__ would answer an unknown name with a bare TypeError.
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}: expected one of {', '.join(known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if not self._knows_page_size and (self.key_bits != 16 or self.coarse_key_bits is not None):
            object.__setattr__(self, "page_size", GROUP_PAGE)
        self._check_integers()
        self._check_choices()
        self._check_formats()
        self._check_target()
        self._check_sources()
        self._check_grouping()
        self._check_retention()
        if self.budget_tokens == "auto" and self.device_bytes is None:
            object.__setattr__(self, "budget_tokens", DEFAULT_BUDGET)
        if self.budget_tokens is None and self.device_bytes is not None:
            raise ConfigError(
                f"budget_tokens=None beside device_bytes={self.device_bytes}: unlimited is "
                "everything, whatever it takes; leave the budget out to attend as much as fits"
            )
        for budget in _flatten(self.budget_tokens, depth=2):
            self._check_budget(budget)
        layers = self.budget_tokens if isinstance(self.budget_tokens, list | tuple) else ()
        if any(isinstance(layer, list | tuple) and None in layer for layer in layers):
            raise ConfigError(
                f"budget_tokens={self.budget_tokens!r}: a layer is unlimited as a whole (None in "
                "place of its tuple), not one of its KV heads"
            )
        for name in ("budget_tokens", "layer_sources"):
            if isinstance(getattr(self, name), list | tuple):
                object.__setattr__(self, name, _as_tuple(getattr(self, name)))

    @classmethod
    def preset(cls, name: str, **settings: Any) -> CacheConfig:
        """The settings for pages of a named format, one of `PRESETS`: "K8V4", "K4V2" ...

        CacheConfig.preset("K4V2", budget_tokens=4096)
        CacheConfig.preset("K8V4+K4V2")     # the second for pages that are attended little
        """
        formats = [PRESETS.get(part) for part in str(name).split("+")]
        if None in formats or len(formats) > 2:
            raise ConfigError(
                f"preset {name!r}: expected one of {', '.join(PRESETS)}, or two of them as in "
                "'K8V4+K4V2'"
            )
        given = [setting for setting in settings if setting.endswith(("key_bits", "value_bits"))]
        if given:
            raise ConfigError(
                f"preset {name!r} beside {', '.join(given)}: the preset sets the bits"
            )
        fine, coarse = formats[0], formats[-1]
        assert fine is not None
        assert coarse is not None
        settings |= {"key_bits": fine.key_bits, "value_bits": fine.value_bits}
        if len(formats) == 2:
            settings |= {
                "coarse_key_bits": coarse.key_bits,
                "coarse_value_bits": coarse.value_bits,
            }
        return cls(**settings)

    def on(self, device_type: str) -> CacheConfig:
        """The settings with a page size, on a device of this type: "cpu", "cuda" ..."""
        if self._knows_page_size:
            return self
        rows = self.has_token_rows(device_type)
        return replace(self, page_size=TINY_PAGE if rows else SMALL_PAGE)

    def has_token_rows(self, device_type: str) -> bool:
        """Whether the page index on such a device is the token index with a scale per token."""
        return self.index == "tokens" and self.index_bits is None and device_type == "cpu"

    @property
    def _knows_page_size(self) -> bool:
        return vars(self)["page_size"] is not None

    @property
    def _known_page_size(self) -> int:
        if not self._knows_page_size:
            raise ConfigError(
                "page_size=None: it depends on the device; ask config.on('cpu') or on('cuda'), or "
                "give a page_size"
            )
        return self.page_size

    @property
    def format(self) -> PageFormat:
        """The format in which pages are sealed."""
        return PageFormat(self.key_bits, self.value_bits, self.group_size)

    @property
    def coarse_format(self) -> PageFormat | None:
        """The format to which pages that are attended little are demoted; None if there is none."""
        if self.coarse_key_bits is None and self.coarse_value_bits is None:
            return None
        return PageFormat(
            self.coarse_key_bits or self.key_bits,
            self.coarse_value_bits or self.value_bits,
            self.group_size,
        )

    @property
    def rotates_keys(self) -> bool:
        """Whether keys are rotated: where `rotation` asks for it and they are quantised."""
        bits = self.coarse_key_bits or self.key_bits
        return self.rotation in ("keys", "both") and bits < 16

    @property
    def rotates_values(self) -> bool:
        """Whether values are rotated: where `rotation` asks for it and they are quantised."""
        bits = self.coarse_value_bits or self.value_bits
        return self.rotation in ("values", "both") and bits < 16

    @property
    def num_sink_pages(self) -> int:
        """Pages that hold the sinks: `num_sink_tokens` rounded up to whole pages."""
        return -(-self.num_sink_tokens // self._known_page_size)

    @property
    def estimates(self) -> bool:
        """Whether pages that a step does not attend are estimated."""
        return self.estimate_pages != 0

    @property
    def score_reduction(self) -> str:
        """The one of `GROUP_REDUCTIONS` by which scores are reduced where shares are not known."""
        return "softmax-mean" if self.group_reduction == SHARE_MEAN else self.group_reduction

    @property
    def packed_index_bits(self) -> int:
        """Bits per key element of the token index where its codes are packed."""
        return PACKED_INDEX_BITS if self.index_bits is None else self.index_bits

    @property
    def keeper(self) -> Retention | None:
        """What decides which pages are kept; None where all are. Raises `ConfigError`."""
        given = self.retention
        if given is None:
            return None
        from arkcache.methods import RETENTIONS, Retention  # it imports numpy

        if isinstance(given, Retention):
            return given
        if given not in RETENTIONS:
            raise ConfigError(
                f"retention={given!r}: expected one of {', '.join(map(repr, RETENTIONS))}, an "
                "object of arkcache.methods, or None"
            )
        return RETENTIONS[given]()

    def for_layers(self, num_layers: int) -> CacheConfig:
        """The settings with a budget for every layer, where a retention shares budgets out."""
        budget, keeper, dense = self.budget_tokens, self.keeper, self.num_dense_layers
        if keeper is None or not keeper.shares_out:
            return self
        if not isinstance(budget, int) or dense >= num_layers:
            return self
        least = self.num_sink_pages * self.page_size + self.num_recent_tokens + self.page_size
        budgets = (budget,) * dense + keeper.budgets(budget, num_layers - dense, least)
        return replace(self, budget_tokens=budgets)

    @property
    def window_tokens(self) -> int:
        """Capacity of the recent window: it seals a page, or a segment of pages that tokens are
        grouped in, when it holds this many tokens."""
        return self.num_recent_tokens + self._known_page_size * self.segment_pages

    @property
    def segment_pages(self) -> int:
        """Pages behind those of the sinks that are sealed at a time."""
        return 1 if self.grouping is None else self.segment_tokens // self._known_page_size

    @property
    def sealing(self) -> tuple[int, int, int, int]:
        """What `sealed_pages` has to know of the settings."""
        sizes = (self.num_recent_tokens, self._known_page_size)
        return *sizes, self.num_sink_pages, self.segment_pages

    def orders_by_share(self, group: int) -> bool:
        """Whether pages are chosen by the share of attention that they hold.

        group: query heads of a KV head. Scores put pages in the same order for a single one.
        """
        if self.target_missed_mass is not None:
            return True
        return group > 1 and self.group_reduction == SHARE_MEAN and self.index in MASS_INDEXES

    def budget_of(self, layer: int, kv_head: int = 0) -> int | None:
        """Tokens that this KV head of this layer attends in a step; None is all of them."""
        if layer < self.num_dense_layers or self.budget_tokens is None:
            return None
        budget: Any = self.budget_tokens
        if isinstance(budget, tuple):
            budget = budget[layer]
        if isinstance(budget, tuple):
            budget = budget[kv_head]
        if budget == "auto":
            return DEFAULT_BUDGET if self.device_bytes is None else NO_LIMIT
        return None if budget is None else int(budget)

    def selected_pages(self, layer: int, kv_head: int = 0) -> int:
        """Pages that a step may select beside the sinks and the recent window.

        The window holds up to `window_tokens - 1` tokens when it is attended; what the budget
        has left beside that and the sinks is filled with whole pages, so that a step never
        attends more than the budget.
        """
        budget = self.budget_of(layer, kv_head)
        if budget is None:
            raise ConfigError(f"layer {layer} attends everything: it selects no pages")
        fixed = self.num_sink_pages * self.page_size + self.window_tokens - 1
        return max(0, (budget - fixed) // self.page_size)

    def stores(self, layer: int) -> bool:
        """Whether a layer stores keys and values: False where it attends another's."""
        return self.layer_sources is None or self.layer_sources[layer] == layer

    def budgets_of(self, layers: Sequence[int]) -> tuple[Any, ...] | None:
        """The budgets of these layers, as a cache of them alone is told."""
        given = self.budget_tokens
        if given is None:
            return None
        each = given if isinstance(given, tuple) else [given] * (max(layers) + 1)
        dense = self.num_dense_layers
        return tuple(None if layer < dense else each[layer] for layer in layers)

    def of_layers(self, layers: Sequence[int]) -> CacheConfig:
        """The settings of a cache that keeps these layers alone, numbered among themselves."""
        budgets = self.budgets_of(layers)
        return replace(self, num_dense_layers=0, budget_tokens=budgets, layer_sources=None)

    def check_sources(self, num_layers: int) -> None:
        """Raise `ConfigError` unless `layer_sources` has one entry per layer."""
        sources = self.layer_sources
        if sources is not None and len(sources) != num_layers:
            raise ConfigError(
                f"layer_sources has {len(sources)} entries: expected one for each of the "
                f"{num_layers} layers of this cache"
            )

    def check_layers(self, num_layers: int, num_kv_heads: int) -> None:
        """Raise `ConfigError` unless tuple budgets have one entry per layer (and KV head)."""
        budget = self.budget_tokens
        if not isinstance(budget, tuple):
            return
        if len(budget) != num_layers:
            raise ConfigError(
                f"budget_tokens has {len(budget)} entries: expected {num_layers} layers"
            )
        for entry in budget:
            if isinstance(entry, tuple) and len(entry) != num_kv_heads:
                raise ConfigError(
                    f"budget_tokens has {len(entry)} entries in a layer: expected {num_kv_heads} "
                    "KV heads"
                )

    def _check_integers(self) -> None:
        minima = {
            "page_size": 1,
            "num_sink_tokens": 0,
            "num_recent_tokens": 1,
            "num_dense_layers": 0,
            "stream_block_tokens": self.page_size if _is_int(self.page_size) else TINY_PAGE,
            "group_size": 1,
            "segment_tokens": 1,
            "demote_after": 0,
            "estimate_pages": 0,
            "audit_every": 1,
            "device_bytes": 1,
            "host_bytes": 1,
            "host_resident_bytes": 1,
        }
        sizes = ("device_bytes", "host_bytes", "host_resident_bytes", "stream_block_tokens")
        optional = ("page_size", *sizes, "estimate_pages", "audit_every")
        for name, minimum in minima.items():
            value = getattr(self, name)
            if name in optional and value is None:
                continue
            if not _is_int(value) or value < minimum:
                raise ConfigError(f"{name}={value!r}: expected an integer of at least {minimum}")
        for name, least in (("device_pool_factor", 1), ("demote_below", 0)):
            value = getattr(self, name)
            if name == "device_pool_factor" and value is None:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not least <= value < inf:
                raise ConfigError(f"{name}={value!r}: expected a number of at least {least}")

    def _check_choices(self) -> None:
        for name, choices in (
            ("key_bits", BITS),
            ("value_bits", BITS),
            ("coarse_key_bits", (*BITS, None)),
            ("coarse_value_bits", (*BITS, None)),
            ("rotation", ROTATIONS),
            ("grouping", (*GROUPINGS, None)),
            ("packed_slots", (None, False, True)),
            ("backend", BACKENDS),
            ("speculative_recall", (False, True)),
            ("index_bits", (None, 2, 4, 8)),
            ("index", INDEXES),
            ("group_reduction", (SHARE_MEAN, *GROUP_REDUCTIONS)),
        ):
            value = getattr(self, name)
            if not any(type(value) is type(choice) and value == choice for choice in choices):
                expected = ", ".join(map(repr, choices))
                raise ConfigError(f"{name}={value!r}: expected one of {expected}")

    def _check_formats(self) -> None:
        if self.host_path is not None and not (isinstance(self.host_path, str) and self.host_path):
            raise ConfigError(
                f"host_path={self.host_path!r}: expected the name of a folder, or None"
            )
        if self.host_path is not None and self.coarse_format is not None:
            raise ConfigError(
                f"host_path={self.host_path!r} beside a second format, whose pages move: leave one "
                "of the two out"
            )
        coarse = self.coarse_format
        if coarse is None:
            return
        finer = coarse.key_bits > self.key_bits or coarse.value_bits > self.value_bits
        if finer or coarse == self.format:
            raise ConfigError(
                f"coarse format {coarse.name} beside {self.format.name}: expected fewer bits for "
                "keys or values, and more for neither"
            )
        if self.budget_tokens is None:
            raise ConfigError(
                f"coarse format {coarse.name} beside budget_tokens=None: layers that attend "
                "everything demote no page; give a budget, or the coarse format alone"
            )
        if self.packed_slots:
            raise ConfigError(
                "packed_slots=True beside two formats: slots are of one size; leave it at None"
            )

    def _check_target(self) -> None:
        target = self.target_missed_mass
        if target is None:
            return
        if isinstance(target, bool) or not isinstance(target, int | float) or not 0 < target < 1:
            raise ConfigError(
                f"target_missed_mass={target!r}: expected a number between 0 and 1, both excluded, "
                "or None"
            )
        if self.index not in MASS_INDEXES:
            raise ConfigError(
                f"target_missed_mass={target!r} beside index={self.index!r}, which bounds logits: "
                f"expected an index that rates mass, one of {', '.join(map(repr, MASS_INDEXES))}"
            )
        if self.budget_tokens is None:
            raise ConfigError(
                f"target_missed_mass={target!r} beside budget_tokens=None: unlimited misses "
                "nothing; give a budget, which is the most that a step may attend"
            )

    def _check_sources(self) -> None:
        sources = self.layer_sources
        if sources is None:
            return
        if not isinstance(sources, list | tuple) or not sources or not all(map(_is_int, sources)):
            raise ConfigError(
                f"layer_sources={sources!r}: expected the number of a layer for each layer, as in "
                "(0, 0, 2, 2), or None"
            )
        for layer, source in enumerate(sources):
            if not 0 <= source <= layer:
                raise ConfigError(
                    f"layer_sources={sources!r}: layer {layer} cannot attend layer {source}; "
                    f"expected itself or an earlier one, 0 to {layer}"
                )
            if sources[source] != source:
                raise ConfigError(
                    f"layer_sources={sources!r}: layer {layer} attends layer {source}, which "
                    f"stores nothing; expected what that attends, layer {sources[source]}"
                )

    def _check_grouping(self) -> None:
        if self.grouping is None:
            return
        named = f"grouping={self.grouping!r}"
        if not self.estimates:
            raise ConfigError(
                f"{named} beside estimate_pages=0: a step would attend the keys most like its "
                "query and nothing else, which was measured to be worse than no grouping; "
                "estimate the other pages (estimate_pages=None is all)"
            )
        if self.index not in MASS_INDEXES:
            raise ConfigError(
                f"{named} beside index={self.index!r}: such pages are found by their tokens; "
                f"expected an index that rates mass, one of {', '.join(map(repr, MASS_INDEXES))}"
            )
        if not self._knows_page_size:
            return  # checked when the device is known
        pages, rest = divmod(self.segment_tokens, self.page_size)
        if rest or pages < 2 or pages & (pages - 1):
            raise ConfigError(
                f"segment_tokens={self.segment_tokens} beside page_size={self.page_size}: a "
                "segment is halved until its parts are pages; expected page_size times 2, 4, 8 ..."
            )

    def _check_retention(self) -> None:
        if self.retention is None:
            return
        keeper = self.keeper
        assert keeper is not None
        what = f"retention={self.retention!r}"
        if self.budget_tokens is None:
            raise ConfigError(
                f"{what} beside budget_tokens=None: layers that attend everything lose nothing; "
                "give a budget, which is what is kept"
            )
        if self.budget_tokens == "auto" and self.device_bytes is not None and keeper.shares_out:
            raise ConfigError(
                f"{what} beside device_bytes={self.device_bytes} and no budget: layers share a "
                "number of tokens among themselves; give budget_tokens as well"
            )
        for name, why in (
            ("grouping", "the tokens of a page differ from head to head"),
            ("layer_sources", "what layers that share received is not added up"),
            ("host_path", "a file has all heads of a page in one piece"),
            ("target_missed_mass", "what is lost is not there any more to say what a step misses"),
            ("audit_every", "what is lost is not there any more to say what a step misses"),
        ):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{what} beside {name}={getattr(self, name)!r}: {why}; leave one of the two out"
                )
        if self.packed_slots and keeper.observes:
            raise ConfigError(
                f"{what} beside packed_slots=True: attention received is counted on unpacked "
                "slots; leave it at None"
            )

    def _check_budget(self, budget: Any) -> None:
        if budget is None or budget == "auto":
            return
        if not _is_int(budget):
            raise ConfigError(
                f"budget_tokens={self.budget_tokens!r}: expected an integer, None (unlimited), "
                "'auto', or a tuple of them per layer (and per KV head)"
            )
        # Again when the device is known: its pages may be larger.
        page_size = self.page_size if self._knows_page_size else TINY_PAGE
        sinks = -(-self.num_sink_tokens // page_size) * page_size
        what, sealed = "page", page_size
        if self.grouping is not None:
            what, sealed = "segment", self.segment_tokens
        least = sinks + self.num_recent_tokens + sealed
        if budget < least:
            raise ConfigError(
                f"budget_tokens={budget}: the {sinks} sink tokens, {self.num_recent_tokens} "
                f"recent tokens and one {what} of {sealed} need {least}; "
                f"raise the budget or lower the other sizes"
            )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _flatten(budget: Any, depth: int) -> list[Any]:
    """The entries of a budget: per layer, then per KV head."""
    if depth and budget and isinstance(budget, list | tuple):
        return [leaf for item in budget for leaf in _flatten(item, depth - 1)]
    return [budget]


def _as_tuple(budget: Any) -> Any:
    if isinstance(budget, list | tuple):
        return tuple(_as_tuple(item) for item in budget)
    return budget
