"""Products keep their precision whatever the flags say, and the flags stay as they were."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import toys
from conda_dist import Conda
from conda_dist.numerics import arithmetic
from conda_dist.numerics.decomposition import Outcome, decompose
from conda_dist.numerics.precision import exact_product, leaving_flags, matmul_precision

get, set_ = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
FLAGS = [(b, o) for b in ("cuda", "mkldnn") for o in ("all", "matmul")]
SHAPES = ((64, 48), (40, 56), (8,))
"""Large enough for a CPU's product to be rounded, where the flags ask for that."""


def _old(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)


def _allow() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def _new(backend: str, operation: str, precision: str) -> Callable[[], None]:
    return lambda: set_(backend, operation, precision)


FORMS: dict[str, Callable[[], None]] = {
    "untouched": lambda: None,
    "old, high": lambda: _old("high"),
    "old, medium": lambda: _old("medium"),
    "old, allow_tf32": _allow,
    "new, of products": _new("cuda", "matmul", "tf32"),
    "new, of a backend": _new("cuda", "all", "tf32"),
    "new, of all backends": _new("generic", "all", "tf32"),
    "new, bf16 on CPUs": _new("mkldnn", "matmul", "bf16"),
    "new, ieee for all": _new("generic", "all", "ieee"),
}


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    for flag in [("generic", "all"), *FLAGS]:
        set_(*flag, "none")


def _seen() -> list[str]:
    """All flags, and what becomes of them if the user then sets the one of all backends.

    Which tells a flag that inherits from one of the same value.
    """
    before = get("generic", "all")
    found = [str(get(*flag)) for flag in FLAGS]
    for value in ("ieee", "tf32"):
        set_("generic", "all", value)
        found += [str(get(*flag)) for flag in FLAGS]
    set_("generic", "all", before)
    return [str(before), *found]


class Products(TorchDispatchMode):
    """Records what the flags say at every product, or raises at one."""

    def __init__(self, failing: int = -1) -> None:
        super().__init__()
        self.seen: list[tuple[str, str]] = []
        self.dtypes: list[torch.dtype] = []
        self.failing = failing

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function._overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm", "baddbmm_"):
            if len(self.seen) == self.failing:
                raise ValueError("no more products")
            self.seen.append((get("cuda", "matmul"), get("mkldnn", "matmul")))
            self.dtypes.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


def _train(steps: int, products: Products | None = None, **options: Any) -> list[Tensor]:
    params = toys.parameters(*SHAPES)
    given = {**toys.OPTIONS, **options}
    optimizer = Conda(
        [{"params": params[:2], "algorithm": "conda"}, {"params": params[2:]}], **given
    )
    for row in toys.gradients(params, steps):
        for param, grad in zip(params, row, strict=True):
            param.grad = grad
        with products or Products():
            optimizer.step()
    return params


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("given", [None, "tf32"])
def test_products_see_what_they_want_and_flags_stay(form: str, given: str | None) -> None:
    FORMS[form]()
    before, products = _seen(), Products()
    _train(5, products, matmul_dtype=given, refresh_method="orthogonal_iteration")
    assert _seen() == before
    # Two weights, five steps of two products; at step 3 Gram matrices, rotations of three tensors.
    exact, rounded = 2 * 5 * 2, 2 * (1 + 3)
    assert len(products.seen) >= exact + rounded
    assert {cpu for _, cpu in products.seen} <= {"none", "ieee"}
    tf32 = [cuda for cuda, _ in products.seen if cuda == "tf32"]
    assert len(tf32) == (exact if given else 0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("failing", [0, 5, 9, 14])
def test_flags_stay_when_a_product_raises(form: str, failing: int) -> None:
    FORMS[form]()
    before = _seen()
    with pytest.raises((ValueError, RuntimeError), match="no more products"):
        _train(5, Products(failing), matmul_dtype="tf32", refresh_method="orthogonal_iteration")
    assert _seen() == before


def test_the_old_form_can_be_read_after_a_step() -> None:
    """Where the two forms contradict each other reading the old one raises."""
    for given, allowed in (("highest", False), ("high", True), ("medium", True)):
        torch.set_float32_matmul_precision(given)
        _train(4, matmul_dtype="tf32")
        assert torch.get_float32_matmul_precision() == given
        assert torch.backends.cuda.matmul.allow_tf32 is allowed


def _rounds() -> bool:
    """Whether this CPU rounds the operands of products if it may."""
    a, b = toys.random(64, 64), toys.random(64, 64, seed=1)
    exact = a @ b
    torch.set_float32_matmul_precision("medium")
    rounded = a @ b
    torch.set_float32_matmul_precision("highest")
    return not torch.equal(exact, rounded)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"refresh_method": "orthogonal_iteration"},
        {"refresh_method": "eigh64"},
        {"refresh_delay": 2, "refresh_method": "orthogonal_iteration"},
        {"matmul_dtype": "tf32"},
        {"matmul_dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_a_step_is_the_same_under_all_flags(options: dict[str, Any]) -> None:
    """On a CPU whose products the flags round; on others this compares equal runs."""
    plain = _train(8, **options)
    rounds = _rounds()
    torch.set_float32_matmul_precision("medium")
    assert toys.same(_train(8, **options), plain)
    if rounds:
        left = toys.random(64, 48) @ toys.random(48, 64)
        assert not torch.equal(left, exact_product(toys.random(64, 48), toys.random(48, 64)))


class Widening(TorchDispatchMode):
    """A CPU with the products that torch has on CUDA: of bfloat16 matrices, written in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadname not in ("dtype", "dtype_out"):
            return func(*args, **kwargs or {})
        name, scales = func.overloadpacket.__name__, dict(kwargs or {})
        self.seen.append(name)
        *tensors, dtype = args
        assert dtype == torch.float32
        assert {t.dtype for t in tensors[-2:]} == {torch.bfloat16}
        out = scales.pop("out", None)
        wide = getattr(torch, name)(*(t.float() for t in tensors), **scales)
        assert out is None or (out.dtype == dtype and out.shape == wide.shape)
        return wide if out is None else out.copy_(wide)


@pytest.fixture
def widening() -> Iterator[Widening]:
    arithmetic._can_widen.cache_clear()
    with Widening() as mode:
        yield mode
    arithmetic._can_widen.cache_clear()


def test_cpus_do_not_widen() -> None:
    assert not arithmetic.widens(torch.ones(1, dtype=torch.bfloat16), torch.float32)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (3, 9, 4), (2, 3, 4, 9)], ids=str)
@pytest.mark.parametrize("has_out", [False, True])
def test_a_widened_product_is_not_rounded(
    shape: tuple[int, ...], has_out: bool, widening: Widening
) -> None:
    """Batches of batches are multiplied as before."""
    right, half = shape[-2] >= shape[-1], torch.bfloat16
    x, basis = toys.random(*shape, dtype=half), toys.random(*shape[:-2], 4, 4, seed=1, dtype=half)
    out = torch.empty(shape) if has_out else None
    found = arithmetic.project(x, basis, right, out=out)
    assert found.dtype == torch.float32
    assert (found is out) == has_out
    exact = x.float() @ basis.float() if right else basis.float().mT @ x.float()
    widened = len(shape) < 4
    assert torch.equal(found, exact if widened else exact.bfloat16().float())
    assert widening.seen[1:] == {2: ["mm"], 3: ["bmm"], 4: []}[len(shape)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_with_widened_products(dtype: torch.dtype, widening: Widening) -> None:
    """Near those of float32 products. Updates are rounded, as on layouts that exchange them."""

    def trained(**options: Any) -> list[Tensor]:
        params = toys.parameters((24, 16), (12, 20), (2, 6, 5), dtype=dtype)
        group = {"params": params, "algorithm": "conda"}
        optimizer = Conda([group], **toys.OPTIONS, **options)
        toys.take(optimizer, params, toys.gradients(params, 5))
        return params

    expected = trained()
    assert not widening.seen
    found = trained(matmul_dtype=torch.bfloat16)
    assert set(widening.seen) == {"mm", "bmm"}
    for ours, exact in zip(found, expected, strict=True):
        assert not torch.equal(ours, exact)
        torch.testing.assert_close(ours, exact, atol=0.02, rtol=0.01)


def test_a_thread_that_leaves_the_flags_multiplies_in_float64() -> None:
    torch.set_float32_matmul_precision("high")
    products, momentum = Products(), toys.random(48, 40)
    with leaving_flags(), products:
        with matmul_precision("ieee"):
            assert get("cuda", "matmul") == "tf32"
        outcome, rotation, _ = decompose([momentum], True, "orthogonal_iteration")[0]
    assert outcome == Outcome.DONE
    assert {cuda for cuda, _ in products.seen} == {"tf32"}
    assert set(products.dtypes) == {torch.float64}
    _, expected, _ = decompose([momentum], True, "orthogonal_iteration")[0]
    torch.testing.assert_close(rotation, expected, atol=1e-4, rtol=0)


OVERRIDDEN = """
import torch
from conda_dist.numerics.precision import matmul_precision
get = torch._C._get_fp32_precision_getter
seen = [get("cuda", "matmul")]
with matmul_precision("ieee"):
    seen.append(get("cuda", "matmul"))
print(*seen, get("cuda", "matmul"), torch.get_float32_matmul_precision())
"""


def test_the_environment_may_allow_tf32() -> None:
    """Common images set this variable."""
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    said = subprocess.run(
        [sys.executable, "-c", OVERRIDDEN], env=environment, capture_output=True, timeout=60
    )
    assert said.stdout.split() == [b"tf32", b"ieee", b"tf32", b"high"], said.stderr
