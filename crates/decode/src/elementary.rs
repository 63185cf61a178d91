//! Logarithm, and the exponential as a whole number, from fixed operations: the same bits on every machine.
//!
//! The C library's `logf` and `expf` differ between versions and platforms, and a token must not. What
//! follows uses only additions, multiplications, comparisons and bit patterns of `f32`, in a fixed order and
//! without branches, so that loops over it vectorise.

/// The weight of the most probable token: the unit of [`weight`].
pub(crate) const WEIGHT_ONE: u64 = 1 << 40;
/// What [`shifted_weight`] adds: the bits of [`WHOLE_64`].
pub(crate) const SHIFT: u64 = WHOLE_64.to_bits();

/// Adding it leaves a whole number in the low bits of the sum, rounded to nearest.
const WHOLE_64: f64 = 4_503_599_627_370_496.0; // 2^52
/// Exponent bits of 2^-1 · WEIGHT_ONE.
const UNIT_EXPONENT: u32 = 126 + WEIGHT_ONE.ilog2();

/// ln x for any positive x; relative error about 1e-7.
pub(crate) fn ln(x: f32) -> f32 {
    if x < f32::MIN_POSITIVE {
        // A subnormal number has no leading one to split off: borrow 24 binary places.
        let (mantissa, exponent) = split(x * 16_777_216.0);
        return ln_of(mantissa - 1.0, exponent - 24.0);
    }
    if x == f32::INFINITY {
        return x;
    }
    let (mantissa, exponent) = split(x);
    ln_of(mantissa - 1.0, exponent)
}

/// x = m · 2^e with m in [√½, √2): x positive and normal.
#[inline(always)]
pub(crate) fn split(x: f32) -> (f32, f32) {
    const SQRT_HALF: u32 = 0x3f35_04f3;
    const ONE: u32 = 0x3f80_0000;
    let shifted = x.to_bits().wrapping_add(ONE - SQRT_HALF);
    let exponent = ((shifted >> 23) as i32).wrapping_sub(127);
    let mantissa = f32::from_bits((shifted & 0x007f_ffff).wrapping_add(SQRT_HALF));
    (mantissa, exponent as f32)
}

/// ln((1 + f) · 2^e) for f in [√½ − 1, √2 − 1].
///
/// The polynomial and the two-part ln 2 are those of Cephes' `logf` (S. L. Moshier).
#[inline(always)]
pub(crate) fn ln_of(f: f32, e: f32) -> f32 {
    let mut p = 7.037_683_6e-2;
    p = p * f - 1.151_461e-1;
    p = p * f + 1.167_699_84e-1;
    p = p * f - 1.242_014_1e-1;
    p = p * f + 1.424_932_3e-1;
    p = p * f - 1.666_805_7e-1;
    p = p * f + 2.000_071_5e-1;
    p = p * f - 2.499_999_4e-1;
    p = p * f + 3.333_333e-1;
    let square = f * f;
    let tail = square * f * p + e * -2.121_944_4e-4 - 0.5 * square;
    (f + tail) + e * 0.693_359_4
}

/// exp(value − max) as a whole number of [`WEIGHT_ONE`]ths, at most one; relative error about 2e-6, absolute
/// 2⁻⁴¹.
///
/// A whole number, because sums of whole numbers do not depend on their order: the mass of a set of tokens
/// is one number, whichever way it was added up (2²³ tokens fit a `u64`).
///
/// **Monotone**: a larger value never weighs less, which the certificate leans on. With y = (max −
/// value)·log₂e, n = y rounded down and t = 1 − (y − n) in [0, 1], the weight is 2^(−n−1)·p(t), where p is a
/// polynomial for 2^t with positive coefficients, p(0) = 1 and p(1) = 2. Within one n every step is a
/// monotone function rounded to nearest, hence monotone; between two, p(t) never leaves [1, 2]. An infinite
/// maximum weighs one, and all else nothing.
#[inline(always)]
pub(crate) fn weight(value: f32, max: f32) -> u64 {
    if value >= max { WEIGHT_ONE } else { shifted_weight(value, max).wrapping_sub(SHIFT) }
}

/// [`weight`] + [`SHIFT`] where `max` is finite: for sums over rows. There the maximum needs no exception, since p(1) = 2
/// without rounding, and what each of n weights has too much is n · SHIFT in the end.
#[inline(always)]
pub(crate) fn shifted_weight(value: f32, max: f32) -> u64 {
    /// Adding it leaves a whole number in the low bits of the sum, rounded to nearest.
    const WHOLE: f32 = 12_582_912.0; // 1.5 · 2^23
    let y = (max - value) * std::f32::consts::LOG2_E;
    let y = if y < 64.0 { y } else { 64.0 };
    let y = if y > 0.0 { y } else { 0.0 };
    let shifted = (y - 0.5) + WHOLE;
    let n = shifted - WHOLE;
    let t = 1.0 - (y - n);
    let mut p = 2.081_791_5e-4;
    p = p * t + 1.269_216_6e-3;
    p = p * t + 9.652_195_5e-3;
    p = p * t + 5.549_602_2e-2;
    p = p * t + 2.402_272e-1;
    p = p * t + 6.931_472e-1;
    p = p * t + 1.0;
    let whole = shifted.to_bits() & 0xff;
    let scale = f32::from_bits(UNIT_EXPONENT.wrapping_sub(whole) << 23);
    (f64::from(p * scale) + WHOLE_64).to_bits()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_logarithm_is_right_to_the_last_bits_over_the_whole_range() {
        for bits in (1..0x7f80_0000_u32).step_by(997) {
            let x = f32::from_bits(bits);
            let exact = f64::from(x).ln();
            let error = (f64::from(ln(x)) - exact).abs();
            assert!(error <= 2e-7 * exact.abs().max(1e-30) + 1e-37, "ln({x:e}) = {}, not {exact}", ln(x));
        }
        assert_eq!(ln(1.0), 0.0);
    }

    #[test]
    fn weights_are_exponentials_and_never_grow_downwards() {
        let mut last = WEIGHT_ONE;
        // Every float step of the difference would take minutes; these strides cross each whole number many
        // times.
        for bits in (0_u32..0x4220_0000).step_by(613) {
            let distance = f32::from_bits(bits);
            let units = weight(-distance, 0.0);
            assert_eq!(shifted_weight(-distance, 0.0) - SHIFT, units, "{distance:e}");
            assert!(units <= last, "weight grows at {distance:e}");
            last = units;
            let exact = (-f64::from(distance)).exp() * WEIGHT_ONE as f64;
            assert!((units as f64 - exact).abs() <= 3e-6 * exact + 1.0, "exp(-{distance})");
        }
        assert_eq!(last, 0);
        let edges = [f32::NAN, f32::NEG_INFINITY, f32::MIN, 1.0, 2.0, f32::MAX, f32::INFINITY];
        for (value, max) in
            edges.into_iter().flat_map(|value| [f32::MIN, 1.0, f32::MAX].map(|max| (value, max)))
        {
            assert_eq!(shifted_weight(value, max) - SHIFT, weight(value, max), "{value:e} of {max:e}");
        }
    }

    #[test]
    fn infinite_logits_weigh_one_or_nothing() {
        let inf = f32::INFINITY;
        assert_eq!(weight(inf, inf), WEIGHT_ONE);
        assert_eq!(weight(-inf, -inf), WEIGHT_ONE);
        assert_eq!(weight(3.0, inf), 0);
        assert_eq!(weight(-inf, 3.0), 0);
        assert_eq!(weight(-inf, inf), 0);
    }
}
