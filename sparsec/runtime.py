"""`compile` and `Attention`: a mask becomes a callable on tensors.

This file decides when a plan is made (once per signature of shapes, heads and dtype), how tensors are checked, and what
a caller may change afterwards. It must not know how a plan is chosen or run, nor any kernel.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

from sparsec import data
from sparsec.backends.base import MAX_HEAD_DIM, Dtype, Problem
from sparsec.errors import MaskError, SparsecError, UnsupportedError
from sparsec.expr import Expr
from sparsec.handles import register
from sparsec.masks.mask import BoundMask, Mask
from sparsec.planner import Plan, plan, renewed
from sparsec.planner.plans import Reorder
from sparsec.planner.renewal import check_structure
from sparsec.request import (
    Request,
    Tune,
    bound_mask,
    check_mask,
    count,
    device_name,
    dtype_name,
    finite_scale,
    torch_device,
)
from sparsec.score import ScoreFunction, ScoreMod, as_score_mod
from sparsec.score_arguments import ScoreArgs, ScoreArguments, with_sinks
from sparsec.specialisation import Specialisation
from sparsec.stepping import Stepper
from sparsec.tensors import Layout, check_tangents, given_back, requires_grad, taken

if TYPE_CHECKING:
    import torch


def compile(
    mask: Mask | BoundMask,
    seq_len: int | tuple[int, int] | None = None,
    *,
    kv_len: int | None = None,
    q_heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    v_dim: int | None = None,
    dtype: torch.dtype | Dtype | None = None,
    device: torch.device | str | None = None,
    backend: str | None = None,
    template: str | None = None,
    needs_grad: bool | None = None,
    scale: float | None = None,
    score_mod: ScoreMod | Expr | ScoreFunction | None = None,
    layout: Layout = "bhsd",
    tune: Tune | None = None,
    reorder: Reorder = "auto",
) -> Attention:
    """The fastest exact attention for a mask on the machine at hand.

    What is left None is taken from the first `q, k, v` seen and specialised once per signature. When heads, head_dim
    and dtype are all given, the kernel is planned, compiled and checked at once.

    Args:
        mask: Which query attends which key (True means attend).
        seq_len: Queries and keys, or `(q_len, kv_len)`; may be left out where the mask knows its lengths.
        kv_len: Keys, where they are not as many as queries.
        q_heads: Query heads; a multiple of `kv_heads`.
        kv_heads: Key and value heads; `q_heads` by default.
        head_dim: Of q and k, 1 to 256.
        v_dim: Of v and the output; `head_dim` by default.
        dtype: `torch.float32`, `torch.float16`, `torch.bfloat16`, or `"fp32"`, `"fp16"`, `"bf16"`.
        device: Where the tensors will be; the first tensors' by default.
        backend: Only this back end; nothing else is taken silently.
        template: Only this template.
        needs_grad: Whether a backward pass will follow; by default whatever the first tensors require. False refuses
            tensors that require gradients.
        scale: Of the scores; `1/√head_dim` by default.
        score_mod: What happens to scaled scores before softmax: `fn(score, b, h, q_idx, kv_idx)`, traced once, or one
            of `sparsec.score`. Tensors of floats that it captures are read anew at each call and receive gradients.
        layout: Of q, k, v and the output: `"bhsd"` is `[batch, heads, length, dim]`, `"bshd"` has heads and length
            swapped, `"thd"` is `[length, heads, dim]`: sequences packed into one, which the mask keeps apart
            (`masks.documents`).
        tune: `"off"` goes by the cost model, `"cached"` by records where there are any near. `"auto"`, the default,
            does so too, and where none is near lets the first call measure a short list, for about a second, once
            per machine; never in a distributed job, nor under tracing or graph capture. `"quick"` (about ten seconds)
            and `"full"` (minutes) measure before anything runs, in a process of their own. What was measured is
            remembered. `SPARSEC_TUNE` sets the default.
        reorder: `"auto"` lets orders of tokens compete, `"off"` keeps the tokens' own, `"force"` takes another.

    Raises:
        MaskError: The mask does not fit the lengths or heads.
        UnsupportedError: Nothing here can serve the request; carries every refusal.
        BackendMissingError: The back end that was named, or the only one that could serve, lacks something.
        CompileError: The kernel does not compile or fails its check.
    """
    bound = bound_mask(mask, seq_len, kv_len)
    request = Request(
        count("q_heads", q_heads),
        count("kv_heads", kv_heads),
        count("head_dim", head_dim, MAX_HEAD_DIM),
        count("v_dim", v_dim, MAX_HEAD_DIM),
        None if dtype is None else dtype_name(dtype),
        device_name(device),
        backend,
        template,
        needs_grad,
        finite_scale(scale),
        None if score_mod is None else as_score_mod(score_mod),
        layout,
        tune or data.forced_tune_mode() or "auto",  # type: ignore[arg-type]  # checked below
        reorder,
    )
    request.check(bound)
    made = Attention(bound, request)
    if q_heads is not None and head_dim is not None and dtype is not None:
        made.specialise()
    return made


class Attention:
    """Exact attention under one mask: a callable on tensors, specialised once for each signature it meets.

    Calls are thread-safe. Results are deterministic: the same inputs give the same bits with the same plan.
    """

    def __init__(self, bound: BoundMask, request: Request) -> None:
        self._bound = bound
        self._request = request
        self._specialised: dict[tuple[Problem, str], Specialisation] = {}
        self._latest: Specialisation | None = None
        self._lock = threading.Lock()
        self._stepper = Stepper(bound, self._planned)
        self._score_arguments = ScoreArguments(request.score)
        self._is_step_checked = False
        self._held: Attention | None = None
        self._was_updated = False
        self._handle = register(self)

    @overload
    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        score_args: ScoreArgs | None = None,
        return_lse: Literal[False] = False,
    ) -> torch.Tensor: ...
    @overload
    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        score_args: ScoreArgs | None = None,
        return_lse: Literal[True],
    ) -> tuple[torch.Tensor, torch.Tensor]: ...
    @overload
    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        score_args: ScoreArgs | None = None,
        return_lse: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        score_args: ScoreArgs | None = None,
        return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of q to k and v under the mask.

        Args:
            q: `[batch, q_heads, q_len, head_dim]` (layout `"bhsd"`), fp32, fp16 or bf16; any strides.
            k: `[batch, kv_heads, kv_len, head_dim]`, of the same dtype and device.
            v: `[batch, kv_heads, kv_len, v_dim]`, likewise.
            score_args: Tensors in place of those that the score modifier captured, of the same shapes: all in the order
                of their first use (sinks last), or some by the names they have there. What is captured is read anew at
                each call and receives gradients; so does what is given here.
            return_lse: Whether to return the log-sum-exp too.

        Returns:
            `out [batch, q_heads, q_len, v_dim]` in q's dtype and the layout of q; with `return_lse` also
            `lse [batch, q_heads, q_len]` (layout `"thd"`: `[q_heads, q_len]`), fp32, natural logarithm. An empty row
            gives `out = 0`, `lse = -inf`. Under `torch.autocast` inputs are cast as torch's own attention casts them.

        Raises:
            SparsecError: Shapes, dtypes or devices that do not fit.
        """
        import torch

        is_traced = torch.compiler.is_compiling()
        q, k, v = taken(q, k, v, self._request.layout)
        tables, sinks = self._score_arguments.of_call(score_args)
        check_tangents(q, k, v, *tables, sinks)
        needs_grad = requires_grad(q, k, v, *tables, *(() if sinks is None else (sinks,)))
        if needs_grad and not is_traced:
            self._check_gradients()
        lse: torch.Tensor | None
        if needs_grad or is_traced:
            # One operator, whatever the batch: autograd and torch.compile see nothing else.
            import sparsec.torch_ops  # noqa: F401  # its operators must be in torch's registry

            out, lse = torch.ops.sparsec.forward(q, k, v, list(tables), self._handle)
        else:
            needs_lse = return_lse or sinks is not None
            ready = self._score_arguments.ready(tables, q)
            out, lse = self._for(q, k, v, self._request.needs_grad or False).forward(q, k, v, ready, with_lse=needs_lse)
        if sinks is not None:
            assert lse is not None, "sinks need the log-sum-exp"
            out, lse = with_sinks(out, lse, sinks, in_place=not (needs_grad or is_traced))
        return given_back(out, lse, self._request.layout, with_lse=return_lse)

    @overload
    def step(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        score_args: ScoreArgs | None = None,
        return_lse: Literal[False] = False,
    ) -> torch.Tensor: ...
    @overload
    def step(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        score_args: ScoreArgs | None = None,
        return_lse: Literal[True],
    ) -> tuple[torch.Tensor, torch.Tensor]: ...
    @overload
    def step(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        score_args: ScoreArgs | None = None,
        return_lse: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
    def step(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        score_args: ScoreArgs | None = None,
        return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of the newest tokens over a cache that grows: what generation calls for every token.

        `seq_len` was the most tokens the cache will hold. Of the `n` tokens in `k` and `v` the last `q_len` attend:
        rows `n - q_len … n - 1` of the mask, and of its columns those before `n`. Up to 16 queries a step costs no
        planning, whatever `n`; more, such as a prompt, are planned as a call is.

        Args:
            q: `[batch, q_heads, q_len, head_dim]`, the newest tokens; otherwise as in `__call__`.
            k: `[batch, kv_heads, n, head_dim]`, all tokens so far: a slice of a cache allocated once.
            v: `[batch, kv_heads, n, v_dim]`, likewise.
            score_args: As in `__call__`.
            return_lse: Whether to return the log-sum-exp too.

        Returns:
            As `__call__`.

        Raises:
            MaskError: The mask has not as many queries as keys, or `q_len ≤ n ≤ seq_len` does not hold.
            UnsupportedError: Inputs that require gradients; or `compile` was told another template than
                `row_traversal`, or `reorder="force"`.
            SparsecError: Shapes, dtypes or devices that do not fit.
        """
        request = self._request
        q, k, v = taken(q, k, v, request.layout)
        tables, sinks = self._score_arguments.of_call(score_args)
        check_tangents(q, k, v, *tables, sinks)
        if requires_grad(q, k, v, *tables):
            raise UnsupportedError(
                "step was given inputs that require gradients, and has no backward pass: call it under "
                "torch.no_grad(), or call the attention itself"
            )
        if request.template not in (None, "row_traversal"):
            raise UnsupportedError(
                f"compile was told template={request.template!r}, and steps run on row_traversal: leave template out"
            )
        if request.reorder == "force":
            raise UnsupportedError(
                "compile was told reorder='force', and steps keep the tokens' own order: leave reorder out"
            )
        stepper = self._stepper
        stepper.check(q.shape[2], k.shape[2])
        if request.score is not None and request.score.needs_edges:
            raise UnsupportedError(
                "the score modifier counts the edges of the whole mask, and a step sees a part of it: call the "
                "attention itself, or look the bias up by query and key"
            )
        if request.score is not None and not self._is_step_checked:
            length = self._bound.q_len
            request.score.check({"h": q.shape[1], "q_idx": length, "kv_idx": length})
            self._is_step_checked = True
        needs_lse, ready = return_lse or sinks is not None, self._score_arguments.ready(tables, q)
        out, lse = stepper(self._problem(q, k, v, needs_grad=False), q, k, v, ready, with_lse=needs_lse)
        if sinks is not None:
            assert lse is not None, "sinks need the log-sum-exp"
            out, lse = with_sinks(out, lse, sinks)
        return given_back(out, lse, request.layout, with_lse=return_lse)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tables: Sequence[torch.Tensor] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `sparsec::forward` computes: tensors `[batch, heads, length, dim]`, with the log-sum-exp."""
        ready = self._score_arguments.ready(tables, q)
        out, lse = self._for(q, k, v, self._request.needs_grad is not False).forward(q, k, v, ready, with_lse=True)
        assert lse is not None, "the log-sum-exp was asked for"
        return out, lse

    def backward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        d_out: torch.Tensor,
        d_lse: torch.Tensor,
        tables: Sequence[torch.Tensor] = (),
        is_wanted: Sequence[bool] = (),
    ) -> tuple[torch.Tensor, ...]:
        """What `sparsec::backward` computes: gradients of q, k, v and the tables, empty where none is wanted."""
        import torch

        self._check_gradients()
        ready = self._score_arguments.ready(tables, q)
        sums = [torch.zeros_like(t) if wanted else None for t, wanted in zip(ready, is_wanted, strict=True)]
        own = self._for(q, k, v, needs_grad=True).backward(q, k, v, out, lse, d_out, d_lse, ready, sums)
        totals = (
            table.new_empty(0) if total is None else total.reshape(table.shape).to(table.dtype)
            for table, total in zip(tables, sums, strict=True)
        )
        return (*own, *totals)

    def held(self) -> Attention:
        """The same under the mask of now, which no `update` changes: what a backward pass goes back to."""
        held = self._held
        if held is None:
            with self._lock:
                held = self._held
                if held is None:
                    held = object.__new__(Attention)
                    held.__dict__.update(self.__dict__, _held=held, _was_updated=False)
                    self._held = held
        return held

    @property
    def was_updated(self) -> bool:
        """Whether `update` gave it another mask since it was made."""
        return self._was_updated

    def __reduce__(self) -> tuple[object, ...]:
        # Nothing compiled is copied: it is made again when it is needed.
        return Attention, (self._bound, self._request)

    def _check_gradients(self) -> None:
        if self._request.needs_grad is False:
            raise UnsupportedError(
                "the inputs require gradients, and compile was told needs_grad=False: "
                "leave needs_grad out, or call under torch.no_grad()"
            )

    @property
    def plan(self) -> Plan:
        """The plan of the latest signature.

        Raises:
            SparsecError: No tensors have been seen yet, and `compile` was not told their signature.
        """
        return self._current().plan

    def explain(self) -> str:
        """The plan as text, with advice: what `sparsec explain` prints."""
        from sparsec.planner.text import plan_text

        return plan_text(self.plan)

    def source(self) -> dict[str, dict[str, str]]:
        """Source texts by launch, then by file name."""
        return {
            f"{number}. {kernel_launch.template.name} on {kernel_launch.backend}": kernel.source()
            for number, (kernel_launch, kernel) in enumerate(self._current().kernels(), 1)
        }

    def update(self, mask: Mask | BoundMask) -> None:
        """Takes another mask of the same lengths and structure: only index arrays are made, for the kernels at hand.

        The structure is how a mask is built: the same constructors, combined in the same way, with other numbers or
        edges (all explicit edges count as one constructor). Templates, configurations, orders of tokens and which parts
        run apart stay those of the first mask, whether or not they would be chosen for this one.

        Raises:
            MaskError: Its lengths or its structure are others; the mask before stays.
        """
        check_mask(mask)
        bound = mask if isinstance(mask, BoundMask) else mask.bind(*self._bound.shape)
        if bound.shape != self._bound.shape:
            raise MaskError(f"update takes a mask of shape {self._bound.shape}; this one has {bound.shape}")
        check_structure(self._bound.mask, bound.mask)
        with self._lock:
            # Made before anything is replaced: where the new mask cannot be served, the old one stays.
            made = {key: old.renewed(renewed(old.plan, bound)) for key, old in self._specialised.items()}
            for key, old in self._specialised.items():
                made[key].take_over(old)
            # A backward pass that is still to come goes on with what it holds.
            self._bound, self._specialised, self._held, self._was_updated = bound, made, None, True
            self._stepper = Stepper(bound, self._planned)
            self._latest = next(reversed(made.values()), None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the mask, what `compile` was told and what was chosen to a file that `sparsec.load` reads.

        Raises:
            UnsupportedError: The mask cannot be written.
        """
        from sparsec.saving import save

        save(self, path)

    @property
    def bound(self) -> BoundMask:
        """The mask with its lengths."""
        return self._bound

    @property
    def request(self) -> Request:
        """What `compile` was told."""
        return self._request

    def plans(self) -> list[tuple[Problem, str, Plan]]:
        """Every signature that was met, its device, and its plan."""
        with self._lock:
            return [(problem, device, made.plan) for (problem, device), made in self._specialised.items()]

    def install(self, problem: Problem, device_name: str, made: Plan) -> None:
        """Takes a plan for a signature that was made elsewhere; its kernels are compiled at once."""
        specialised = Specialisation(made)
        with self._lock:
            self._specialised[problem, device_name] = self._latest = specialised

    def specialise(self) -> None:
        """Plans, compiles and checks for the signature that `compile` was given."""
        request = self._request
        assert request.q_heads is not None, "specialise needs q_heads"
        assert request.head_dim is not None, "specialise needs head_dim"
        assert request.dtype is not None, "specialise needs a dtype"
        problem = Problem(
            q_len=self._bound.q_len,
            kv_len=self._bound.kv_len,
            q_heads=request.q_heads,
            kv_heads=request.q_heads if request.kv_heads is None else request.kv_heads,
            head_dim=request.head_dim,
            v_dim=request.head_dim if request.v_dim is None else request.v_dim,
            dtype=request.dtype,
            batch=self._bound.n_batch or 1,
            needs_grad=request.needs_grad or False,
        )
        self._specialise(problem, request.device or "cpu")

    def __repr__(self) -> str:
        q_len, kv_len = self._bound.shape
        return f"sparsec.compile({self._bound.mask}, ({q_len}, {kv_len}))"

    def _current(self) -> Specialisation:
        if self._latest is None:
            raise SparsecError(
                "there is no plan yet: call this attention on tensors, or give compile q_heads, head_dim and dtype"
            )
        return self._latest

    def _for(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, needs_grad: bool) -> Specialisation:
        bound = self._bound
        if (q.shape[2], k.shape[2]) != bound.shape:
            is_swapped = (q.shape[1], k.shape[1]) == bound.shape and self._request.layout != "thd"
            others = "bshd" if self._request.layout == "bhsd" else "bhsd"
            hint = f"; or is it layout={others!r}?" if is_swapped else ""
            raise MaskError(
                f"the mask is bound to {bound.q_len} queries and {bound.kv_len} keys, and the tensors have "
                f"{q.shape[2]} and {k.shape[2]} (layout {self._request.layout!r}): compile another for these lengths"
                + hint
            )
        problem = self._problem(q, k, v, needs_grad)
        found = self._specialised.get((problem, str(q.device)))
        if found is None:
            found = self._specialise(problem, str(q.device))
        self._latest = found
        return found

    def _problem(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, needs_grad: bool) -> Problem:
        request = self._request
        _check_device(request.device, q.device)
        # One plan serves every batch size, unless the mask has a member for each element.
        batch = q.shape[0] if self._bound.varies_by_batch else 1
        dtype = dtype_name(q.dtype)
        lengths, heads = (q.shape[2], k.shape[2]), (q.shape[1], k.shape[1])
        problem = Problem(*lengths, *heads, q.shape[3], v.shape[3], dtype, batch, needs_grad)
        for name in ("q_heads", "kv_heads", "head_dim", "v_dim", "dtype"):
            promised, found = getattr(request, name), getattr(problem, name)
            if promised not in (None, found):
                raise SparsecError(f"compile was told {name}={promised}, and the tensors have {found}")
        return problem

    def _specialise(self, problem: Problem, device_name: str) -> Specialisation:
        with self._lock:
            key = (problem, device_name)
            found = self._specialised.get(key)
            if found is None:
                found = self._specialised[key] = self._made(self._bound, *key)
            self._latest = found
            return found

    def _made(self, bound: BoundMask, problem: Problem, device_name: str) -> Specialisation:
        request = self._request
        planned = self._planned(bound, problem, device_name)
        may_measure = request.tune in ("auto", "quick", "full")
        if may_measure and _tuner().improve(planned, request, device_name):
            planned = self._planned(bound, problem, device_name)
        return Specialisation(planned)

    def _planned(self, bound: BoundMask, problem: Problem, device_name: str, *, in_rows: bool = False) -> Plan:
        """What should run as the caller asked; `in_rows`: row by row, in the tokens' own order."""
        request = self._request
        return plan(
            bound,
            problem,
            torch_device(device_name),
            template="row_traversal" if in_rows else request.template,
            backend=request.backend,
            reorder="off" if in_rows else request.reorder,
            scale=request.scale,
            score=request.score,
            tune="off" if request.tune == "off" else "cached",
        )


class Tuner(Protocol):
    """Measures, so that records say more: a layer above this one, found by name like a back end."""

    def improve(self, made: Plan, request: Request, where: str) -> bool:
        """Measures for a plan as `request.tune` says; whether another plan by the records may be better."""
        ...


def _tuner() -> Tuner:
    module: Any = importlib.import_module("sparsec.tuning.calls")  # found by name, so a module object it is
    made: Tuner = module.tuner()
    return made


def _check_device(told: str | None, found: torch.device) -> None:
    """Raises where tensors are elsewhere than `compile` was told; a name of `devices.yaml` stands for any GPU here."""
    if told is None:
        return
    family, _, index = told.partition(":")
    is_family = found.type == ("cpu" if family == "cpu" else "cuda")
    if not is_family or (found.type == "cuda" and index not in ("", str(found.index))):
        raise SparsecError(f"compile was told device={told}, and the tensors are on {found}")
