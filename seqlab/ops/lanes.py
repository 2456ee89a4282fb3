"""Sixteen numbers at a time inside numba: a vector type, its arithmetic, exp and log1p.

The tensors are channel-last, so sixteen neighbouring channels are one 64-byte load (float32). Plain numba loops leave it
to the optimiser to find that; here the vectors are explicit: `Lanes` is an LLVM <16 x float> (or double) held in
registers, on any machine (AVX-512: one register, AVX2: two, NEON: four). `a * b + c` contracts to a fused multiply-add.

Kernels get addresses (int64) and strides in bytes, plus two scalars whose *types* say how data are stored and in what
they are computed: `like` (uint16 = bfloat16 bits, float32, float64) and `work` (float32, float64).

Only kernel files import this: it imports numba.
"""

import hashlib
import operator
from pathlib import Path

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, register_model

from seqlab.ops.compiled import compiled

WIDTH = 16

# 2^f = 1 + f p(f) on [-1/2, 1/2] and log(1 + w) = w q(w) on [0, 1]: interpolation of p and q at Chebyshev nodes in 40-digit
# arithmetic, lowest power first. Relative error of the polynomials themselves: 5e-9 and 5e-9 (float32), 9e-18 and 1e-17.
# 2^0 is exactly 1, which is what lets a state pass a masked position untouched.
_EXP2 = {
    32: (0.69314718802622879, 0.24022650760568127, 0.055503571142190778, 0.0096180825572778515, 0.0013390863364666234,
         0.00015453162945120690),
    64: (0.69314718055994530942, 0.24022650695910098220, 0.055504108664821594339, 0.0096181291076068885273,
         0.0013333558146416935310, 0.00015403530441736050155, 0.000015252733829836118394, 1.3215442587921689653e-6,
         1.0178062445845773521e-7, 7.0725859492692236999e-9, 4.4549605981865183938e-10),
}  # fmt: skip
_LOG1P = {
    32: (0.9999999946562919754, -0.49999892648063278673, 0.33329710498917748649, -0.24951616262872074329,
         0.1966327425720480527, -0.15269667074363287768, 0.10543623795419526143, -0.056373612830107328154,
         0.0195425272610141015, -0.0031760570184319596946),
    64: (0.99999999999999998957, -0.49999999999999078969, 0.33333333333197525222, -0.24999999992009523433,
         0.19999999749856522815, -0.16666661848248538627, 0.14285651975275926181, -0.12499427063514381128,
         0.1110721158529953785, -0.099797680965865683328, 0.090090958151986324508, -0.080709545784302058312,
         0.070152962365264714098, -0.057189785341939058592, 0.041925709853904157296, -0.026398779480743217184,
         0.01359877809061725369, -0.0054217339910016096588, 0.0015535244034334333623, -0.00028274211393741071646,
         0.000024437973948580947113),
}  # fmt: skip
_MANTISSA = {32: 23, 64: 52}
_LOG2E = 1.4426950408889634074
_LOG2E_REST = {32: 1.9259629911266175e-8, 64: 2.0355273740931033e-17}  # what rounding log2(e) to that type leaves out


def compile_kernel(function):
    """numba.njit without the interpreter lock, cached on disk (beside the source, else in the user's cache directory).

    The cache is keyed by this file's text too, since numba looks only at the kernel's own file. Where no directory can
    be written the kernel is compiled anew in each process.
    """
    function.__qualname__ = f"{function.__name__}_{_TEXT_KEY}"
    return compiled(nogil=True, error_model="numpy", boundscheck=False)(function)


helper = njit(nogil=True, error_model="numpy", boundscheck=False)
"""For small functions that kernels call; they are inlined into the kernel and cached with it."""

_TEXT_KEY = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:10]


class Lanes(types.Type):
    """Sixteen float32 or float64."""

    def __init__(self, scalar):
        self.scalar = scalar
        super().__init__(name=f"Lanes({scalar} x {WIDTH})")


F32, F64 = Lanes(types.float32), Lanes(types.float64)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type):
        super().__init__(manager, fe_type, ir.VectorType(_scalar_ir(fe_type), WIDTH))


def _scalar_ir(lanes):
    return ir.FloatType() if lanes.scalar == types.float32 else ir.DoubleType()


def _lanes_of(scalar):
    """The vector type in which data stored as `scalar` (uint16: bfloat16 bits) are computed."""
    return F64 if scalar == types.float64 else F32


def _is_storage(scalar):
    return scalar in (types.uint16, types.float32, types.float64)


# ---------------------------------------------------------------------------------------------------- arithmetic


def _splat(builder, value):
    empty = ir.Constant(ir.VectorType(value.type, WIDTH), ir.Undefined)
    one = builder.insert_element(empty, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, empty, ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH))


def _constant(vector, value):
    return ir.Constant(vector, [value] * WIDTH)


class _Binary(AbstractTemplate):
    def generic(self, args, kws):
        if len(args) == 2 and isinstance(args[0], Lanes) and args[1] in (args[0], args[0].scalar):
            return signature(args[0], *args)


def _lower_binary(op, emit):
    @infer_global(op)
    class _Template(_Binary):
        pass

    @lower_builtin(op, Lanes, Lanes)
    def both(context, builder, sig, args):
        return emit(builder, args[0], args[1])

    @lower_builtin(op, Lanes, types.Float)
    def with_scalar(context, builder, sig, args):
        return emit(builder, args[0], _splat(builder, args[1]))


_lower_binary(operator.add, lambda b, x, y: b.fadd(x, y, flags=("contract",)))
_lower_binary(operator.sub, lambda b, x, y: b.fsub(x, y, flags=("contract",)))
_lower_binary(operator.mul, lambda b, x, y: b.fmul(x, y, flags=("contract",)))
_lower_binary(operator.truediv, lambda b, x, y: b.fdiv(x, y))


@intrinsic
def splat(typingctx, work, value):
    """The same number in all lanes."""
    lanes = _lanes_of(work)

    def codegen(context, builder, sig, args):
        return _splat(builder, context.cast(builder, args[1], sig.args[1], lanes.scalar))

    return lanes(work, value), codegen


def _pick(builder, x, y, indices):
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(ir.IntType(32), len(indices)), list(indices)))


# ------------------------------------------------------------------------------------------------------- memory


def _at(builder, address, kind):
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic
def load(typingctx, like, address):
    """Sixteen numbers stored as `like` says, starting at `address`."""
    if not _is_storage(like):
        return None
    lanes = _lanes_of(like)
    brain = like == types.uint16

    def codegen(context, builder, sig, args):
        if not brain:
            return builder.load(_at(builder, args[1], ir.VectorType(_scalar_ir(lanes), WIDTH)), align=1)
        bits = builder.load(_at(builder, args[1], ir.VectorType(ir.IntType(16), WIDTH)), align=1)
        words = ir.VectorType(ir.IntType(32), WIDTH)
        wide = builder.shl(builder.zext(bits, words), _constant(words, 16))
        return builder.bitcast(wide, ir.VectorType(ir.FloatType(), WIDTH))

    return lanes(like, types.int64), codegen


@intrinsic
def store(typingctx, like, address, x):
    """Write sixteen numbers as `like` says; bfloat16 is rounded to nearest even, NaN stays NaN."""
    if not _is_storage(like) or x != _lanes_of(like):
        return None
    brain = like == types.uint16

    def codegen(context, builder, sig, args):
        _, address, value = args
        if brain:
            words = ir.VectorType(ir.IntType(32), WIDTH)
            bits = builder.bitcast(value, words)
            odd = builder.and_(builder.lshr(bits, _constant(words, 16)), _constant(words, 1))
            rounded = builder.add(builder.add(bits, _constant(words, 0x7FFF)), odd)
            is_nan = builder.fcmp_unordered("uno", value, value)
            rounded = builder.select(is_nan, _constant(words, 0x7FC00000), rounded)
            halves = ir.VectorType(ir.IntType(16), WIDTH)
            value = builder.trunc(builder.lshr(rounded, _constant(words, 16)), halves)
        builder.store(value, _at(builder, address, value.type), align=1)
        return context.get_dummy_value()

    return types.void(like, types.int64, x), codegen


@intrinsic
def peek(typingctx, work, address):
    """One number."""

    def codegen(context, builder, sig, args):
        return builder.load(_at(builder, args[1], context.get_value_type(sig.return_type)))

    return work(work, types.int64), codegen


@intrinsic
def poke(typingctx, work, address, value):
    """Write one number of `work`'s type."""
    if value != work:
        return None

    def codegen(context, builder, sig, args):
        builder.store(args[2], _at(builder, args[1], args[2].type))
        return context.get_dummy_value()

    return types.void(work, types.int64, value), codegen


@intrinsic
def poke_totals(typingctx, address, x, y):
    """Write the sum of x's lanes and, next to it, the sum of y's; always added in the same order."""

    def codegen(context, builder, sig, args):
        address, x, y = args
        half = WIDTH // 2
        x, y = (builder.fadd(_pick(builder, v, v, range(half)), _pick(builder, v, v, range(half, WIDTH))) for v in (x, y))
        while half > 1:  # x's partial sums lie in the first half of a vector, y's in the second, and the two fold alike
            half //= 2
            first, second = range(half), range(half, 2 * half)
            if half == WIDTH // 4:
                left = _pick(builder, x, y, [*first, *(i + 2 * half for i in first)])
                right = _pick(builder, x, y, [*second, *(i + 2 * half for i in second)])
            else:
                left = _pick(builder, x, x, [*first, *(i + 2 * half for i in first)])
                right = _pick(builder, x, x, [*second, *(i + 2 * half for i in second)])
            x = builder.fadd(left, right)
        builder.store(x, _at(builder, address, x.type), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, x, y), codegen


@intrinsic
def peek_byte(typingctx, address):
    """One byte, as an integer."""

    def codegen(context, builder, sig, args):
        return builder.zext(builder.load(_at(builder, args[0], ir.IntType(8))), ir.IntType(64))

    return types.int64(types.int64), codegen


@intrinsic
def copy_bytes(typingctx, destination, source, count):
    def codegen(context, builder, sig, args):
        byte = ir.IntType(8)
        cgutils.raw_memcpy(builder, _at(builder, args[0], byte), _at(builder, args[1], byte), args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def prefetch(typingctx, address):
    """Ask for a cache line (into the second level), without waiting. Any address is allowed."""

    def codegen(context, builder, sig, args):
        word = ir.IntType(32)
        pointer = _at(builder, args[0], ir.IntType(8))
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, word, word, word])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        builder.call(function, [pointer, *(ir.Constant(word, value) for value in (0, 2, 1))])  # read, level 2, data
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@helper
def load_part(like, address, lanes, size, scratch):
    """`lanes` numbers and zeros in the other lanes; nothing beyond them is read. `scratch` holds one vector of zeros."""
    if lanes == 16:
        return load(like, address)
    copy_bytes(scratch, address, lanes * size)
    return load(like, scratch)


@helper
def store_part(like, address, lanes, size, scratch, x):
    """Write the first `lanes` numbers. Uses `scratch` (another vector than load_part's, which must stay zero)."""
    if lanes == 16:
        store(like, address, x)
    else:
        store(like, scratch, x)
        copy_bytes(address, scratch, lanes * size)


# -------------------------------------------------------------------------------------------------- transcendental


def _sizes(vector):
    """(bits, mantissa bits, exponent bias) of the vector's numbers."""
    bits = 32 if isinstance(vector.element, ir.FloatType) else 64
    return bits, _MANTISSA[bits], 2 ** (bits - _MANTISSA[bits] - 2) - 1


def _fma(builder, x, y, z):
    """x y + z rounded once, always (the contraction of `a * b + c` is the optimiser's choice)."""
    name = f"llvm.fma.v{WIDTH}f{_sizes(x.type)[0]}"
    kind = ir.FunctionType(x.type, [x.type] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), (x, y, z))


def _clamp(builder, x, low, high):
    """Comparing this way round lets NaN through."""
    for bound, test in ((low, "<"), (high, ">")):
        limit = _constant(x.type, bound)
        x = builder.select(builder.fcmp_ordered(test, x, limit), limit, x)
    return x


def _emit_exp2(builder, x, rest=None):
    """2^(x + rest), x clamped by the caller to where the exponent is representable or just out: scale 0, or inf."""
    vector = x.type
    bits, mantissa, bias = _sizes(vector)
    words = ir.VectorType(ir.IntType(bits), WIDTH)
    # Adding 1.5 * 2^mantissa rounds x to an integer that then sits in the low bits.
    magic = _constant(vector, 1.5 * 2.0**mantissa)
    shifted = builder.fadd(x, magic)
    f = builder.fsub(x, builder.fsub(shifted, magic))
    if rest is not None:
        f = builder.fadd(f, rest)
    p = _emit_horner(builder, f, (1.0, *_EXP2[bits]))
    exponent = builder.shl(builder.bitcast(shifted, words), _constant(words, mantissa))
    scale = builder.bitcast(builder.add(exponent, _constant(words, bias << mantissa)), vector)
    return builder.fmul(p, scale)


def _emit_horner(builder, x, coefficients):
    value = _constant(x.type, coefficients[-1])
    for c in coefficients[-2::-1]:
        value = builder.fadd(
            builder.fmul(value, x, flags=("contract",)), _constant(x.type, c), flags=("contract",)
        )
    return value


@intrinsic
def fma(typingctx, x, y, z):
    """x y + z, rounded once. `x * y + z` normally becomes this too; here the optimiser has no choice of the product."""
    return x(x, y, z), lambda context, builder, sig, args: _fma(builder, *args)


@intrinsic
def exp2(typingctx, x):
    """2^x: 1 ulp; 0 below 2^-126 (no subnormals), inf from about 2^127.5 (float32); NaN stays NaN."""

    def codegen(context, builder, sig, args):
        bias = _sizes(args[0].type)[2]
        return _emit_exp2(builder, _clamp(builder, args[0], -float(bias), bias + 1.0))

    return x(x), codegen


@intrinsic
def exp(typingctx, x):
    """e^x: 2 ulp; 0 and inf where exp2 has them."""

    def codegen(context, builder, sig, args):
        vector = args[0].type
        bits, _, bias = _sizes(vector)
        x = _clamp(builder, args[0], -(bias + 0.2) / _LOG2E, (bias + 1.0) / _LOG2E)
        log2e = _constant(vector, _LOG2E)
        rounded = builder.fmul(x, log2e)
        # What the rounded product misses is small but matters: the exponent turns absolute into relative error.
        missing = _fma(builder, x, log2e, builder.fsub(_constant(vector, -0.0), rounded))
        rest = _fma(builder, x, _constant(vector, _LOG2E_REST[bits]), missing)
        return _emit_exp2(builder, rounded, rest)

    return x(x), codegen


@intrinsic
def log1p_unit(typingctx, w):
    """log(1 + w) for w in [0, 1]."""

    def codegen(context, builder, sig, args):
        w = args[0]
        return builder.fmul(w, _emit_horner(builder, w, _LOG1P[_sizes(w.type)[0]]))

    return w(w), codegen


@intrinsic
def select_positive(typingctx, x, yes, no):
    """Lane by lane: yes where x > 0, else no."""

    def codegen(context, builder, sig, args):
        return builder.select(builder.fcmp_ordered(">", args[0], _constant(args[0].type, 0.0)), args[1], args[2])

    return yes(x, yes, no), codegen


@helper
def sigmoid(work, x):
    """1 / (1 + e^-x)."""
    one = splat(work, 1.0)
    return one / (one + exp(splat(work, 0.0) - x))


@helper
def softplus(work, x):
    """(log(1 + e^x), its slope 1 / (1 + e^-x)); relative precision kept far below 0."""
    zero = splat(work, 0.0)
    one = splat(work, 1.0)
    e = exp(select_positive(x, zero - x, x))
    slope = one / (one + e)
    return select_positive(x, x, zero) + log1p_unit(e), select_positive(x, slope, slope * e)
