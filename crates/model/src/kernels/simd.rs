//! Sixteen f32 lanes with the same bits on every instruction set.
//!
//! A kernel is written once against [`F32x16`] and compiled for AVX-512 (one register), AVX2 with FMA (two)
//! and plain Rust (an array, which LLVM turns into NEON on ARM). All three perform the same IEEE operations
//! in the same order — fused multiply-adds included, never contracted or reassociated — so a number does
//! not depend on the machine that computed it.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64 as x86;

/// Lanes of a vector: positions of a cache block panel, output columns of a weight panel.
pub const LANES: usize = 16;

/// An instruction set that this processor has. Holding one is the proof that its kernels may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Kind);

/// Sixteen lanes of f32.
///
/// Implementations are private to this file: a kernel receives one through [`Isa::run`], which is why its
/// arithmetic needs no `unsafe`.
pub trait F32x16: Copy {
    /// 32 registers of 512 bits, so that 28 accumulators fit; else 16 of 256 bits, and 6 fit.
    const WIDE: bool;

    fn splat(x: f32) -> Self;

    /// # Safety
    /// `from` is readable for 16 floats; no alignment is needed.
    unsafe fn load(from: *const f32) -> Self;

    /// # Safety
    /// `to` is writable for 16 floats; no alignment is needed.
    unsafe fn store(self, to: *mut f32);

    /// Asks for the cache line of `from`, which may be any address, into the second-level cache.
    fn prefetch(from: *const f32);

    fn add(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;

    /// `self * factor + addend`, rounded once.
    fn mul_add(self, factor: Self, addend: Self) -> Self;

    /// The greater; `other` where either is NaN.
    fn max(self, other: Self) -> Self;

    /// The lesser; `other` where either is NaN.
    fn min(self, other: Self) -> Self;

    /// `self`, or 0 in the lanes where `test < limit`.
    fn zero_where_less(self, test: Self, limit: Self) -> Self;

    /// Reads each lane's bits as an integer i and returns the float 2^(low 9 bits of i, signed).
    fn power_of_two(self) -> Self;

    /// The lanes, in order.
    #[inline(always)]
    fn lanes(self) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        // Safety: `lanes` is 16 floats.
        unsafe { self.store(lanes.as_mut_ptr()) };
        lanes
    }

    /// Sum over the lanes as a tree: halves, quarters, eighths, pairs.
    #[inline(always)]
    fn sum(self) -> f32 {
        let mut lanes = self.lanes();
        for half in [8, 4, 2, 1] {
            for lane in 0..half {
                lanes[lane] += lanes[lane + half];
            }
        }
        lanes[0]
    }

    /// The greatest lane.
    #[inline(always)]
    fn greatest(self) -> f32 {
        let mut lanes = self.lanes();
        for half in [8, 4, 2, 1] {
            for lane in 0..half {
                lanes[lane] = if lanes[lane] > lanes[lane + half] { lanes[lane] } else { lanes[lane + half] };
            }
        }
        lanes[0]
    }

    /// e^self within 2 units in the last place; 0 below -87.3; held at e^88 above 88; NaN stays NaN.
    ///
    /// Cody and Waite's reduction to |r| <= ln(2)/2 and the polynomial of Cephes' `expf`.
    #[inline(always)]
    fn exp(self) -> Self {
        /// 1.5 · 2^23: adding it leaves the nearest integer in the low bits.
        const ROUND: f32 = 12_582_912.0;
        const LN_2_HIGH: f32 = 0.693_359_4;
        const LN_2_LOW: f32 = -2.121_944_4e-4;
        const LEAST: f32 = -87.336_54;
        let x = Self::splat(LEAST).max(Self::splat(88.0).min(self));
        let shifted = x.mul_add(Self::splat(std::f32::consts::LOG2_E), Self::splat(ROUND));
        let n = shifted.add(Self::splat(-ROUND));
        let r = n.mul_add(Self::splat(-LN_2_HIGH), x);
        let r = n.mul_add(Self::splat(-LN_2_LOW), r);
        let mut p = Self::splat(1.987_569_1e-4);
        for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = p.mul_add(r, Self::splat(coefficient));
        }
        let p = p.mul_add(r.mul(r), r).add(Self::splat(1.0));
        p.mul(shifted.power_of_two()).zero_where_less(self, Self::splat(LEAST))
    }
}

/// A computation that is compiled once per instruction set.
pub trait Kernel {
    /// Must be `#[inline(always)]`, and so must everything generic over `V` that it calls: the instructions
    /// are enabled in the function that it is inlined into.
    fn run<V: F32x16>(self);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

/// AVX-512: one register.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct Zmm(x86::__m512);

/// AVX2 and FMA: two registers.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct Ymm(x86::__m256, x86::__m256);

#[derive(Clone, Copy)]
struct Portable([f32; LANES]);

impl Isa {
    /// What this processor has, the fastest first; never empty.
    pub fn available() -> Vec<Isa> {
        let mut kinds = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                kinds.push(Kind::Avx512);
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                kinds.push(Kind::Avx2);
            }
        }
        kinds.push(Kind::Portable);
        kinds.into_iter().map(Isa).collect()
    }

    /// The fastest that this processor has.
    pub fn best() -> Isa {
        Self::available()[0]
    }

    pub fn name(self) -> &'static str {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2",
            Kind::Portable => "portable",
        }
    }

    /// [`F32x16::WIDE`] of the vectors that [`Isa::run`] hands out.
    pub fn is_wide(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => Zmm::WIDE,
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => Ymm::WIDE,
            Kind::Portable => Portable::WIDE,
        }
    }

    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) {
        match self.0 {
            // Safety: an `Isa` of this kind is made only where the processor has the features.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => unsafe { run_avx512(kernel) },
            // Safety: as above.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => unsafe { run_avx2(kernel) },
            Kind::Portable => kernel.run::<Portable>(),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn run_avx512<K: Kernel>(kernel: K) {
    kernel.run::<Zmm>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2<K: Kernel>(kernel: K) {
    kernel.run::<Ymm>()
}

// Safety, for every block below: values of `Zmm` and `Ymm` exist only inside `run_avx512` and `run_avx2`.
#[cfg(target_arch = "x86_64")]
impl F32x16 for Zmm {
    const WIDE: bool = true;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self(unsafe { x86::_mm512_set1_ps(x) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(unsafe { x86::_mm512_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { x86::_mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    fn prefetch(from: *const f32) {
        unsafe { x86::_mm_prefetch::<{ x86::_MM_HINT_T1 }>(from.cast()) }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(unsafe { x86::_mm512_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(unsafe { x86::_mm512_mul_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Self(unsafe { x86::_mm512_div_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(unsafe { x86::_mm512_fmadd_ps(self.0, factor.0, addend.0) })
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(unsafe { x86::_mm512_max_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self(unsafe { x86::_mm512_min_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn zero_where_less(self, test: Self, limit: Self) -> Self {
        unsafe {
            let keep = x86::_mm512_cmp_ps_mask::<{ x86::_CMP_NLT_UQ }>(test.0, limit.0);
            Self(x86::_mm512_maskz_mov_ps(keep, self.0))
        }
    }

    #[inline(always)]
    fn power_of_two(self) -> Self {
        unsafe {
            let exponent = x86::_mm512_slli_epi32::<23>(x86::_mm512_castps_si512(self.0));
            let one = x86::_mm512_set1_epi32(0x3f80_0000);
            Self(x86::_mm512_castsi512_ps(x86::_mm512_add_epi32(exponent, one)))
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl F32x16 for Ymm {
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        let half = unsafe { x86::_mm256_set1_ps(x) };
        Self(half, half)
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { Self(x86::_mm256_loadu_ps(from), x86::_mm256_loadu_ps(from.add(8))) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe {
            x86::_mm256_storeu_ps(to, self.0);
            x86::_mm256_storeu_ps(to.add(8), self.1);
        }
    }

    #[inline(always)]
    fn prefetch(from: *const f32) {
        unsafe { x86::_mm_prefetch::<{ x86::_MM_HINT_T1 }>(from.cast()) }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        unsafe { Self(x86::_mm256_add_ps(self.0, other.0), x86::_mm256_add_ps(self.1, other.1)) }
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        unsafe { Self(x86::_mm256_mul_ps(self.0, other.0), x86::_mm256_mul_ps(self.1, other.1)) }
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        unsafe { Self(x86::_mm256_div_ps(self.0, other.0), x86::_mm256_div_ps(self.1, other.1)) }
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        unsafe {
            Self(
                x86::_mm256_fmadd_ps(self.0, factor.0, addend.0),
                x86::_mm256_fmadd_ps(self.1, factor.1, addend.1),
            )
        }
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        unsafe { Self(x86::_mm256_max_ps(self.0, other.0), x86::_mm256_max_ps(self.1, other.1)) }
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        unsafe { Self(x86::_mm256_min_ps(self.0, other.0), x86::_mm256_min_ps(self.1, other.1)) }
    }

    #[inline(always)]
    fn zero_where_less(self, test: Self, limit: Self) -> Self {
        unsafe {
            let low = x86::_mm256_cmp_ps::<{ x86::_CMP_NLT_UQ }>(test.0, limit.0);
            let high = x86::_mm256_cmp_ps::<{ x86::_CMP_NLT_UQ }>(test.1, limit.1);
            Self(x86::_mm256_and_ps(low, self.0), x86::_mm256_and_ps(high, self.1))
        }
    }

    #[inline(always)]
    fn power_of_two(self) -> Self {
        unsafe {
            let one = x86::_mm256_set1_epi32(0x3f80_0000);
            let low = x86::_mm256_slli_epi32::<23>(x86::_mm256_castps_si256(self.0));
            let high = x86::_mm256_slli_epi32::<23>(x86::_mm256_castps_si256(self.1));
            Self(
                x86::_mm256_castsi256_ps(x86::_mm256_add_epi32(low, one)),
                x86::_mm256_castsi256_ps(x86::_mm256_add_epi32(high, one)),
            )
        }
    }
}

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, op: impl Fn(f32, f32) -> f32) -> Self {
        let mut lanes = self.0;
        for lane in 0..LANES {
            lanes[lane] = op(lanes[lane], other.0[lane]);
        }
        Self(lanes)
    }
}

impl F32x16 for Portable {
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([x; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(unsafe { from.cast::<[f32; LANES]>().read() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { to.cast::<[f32; LANES]>().write(self.0) }
    }

    #[inline(always)]
    fn prefetch(_: *const f32) {}

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        let mut lanes = addend.0;
        for lane in 0..LANES {
            lanes[lane] = self.0[lane].mul_add(factor.0[lane], lanes[lane]);
        }
        Self(lanes)
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn zero_where_less(self, test: Self, limit: Self) -> Self {
        let mut lanes = self.0;
        for lane in 0..LANES {
            if test.0[lane] < limit.0[lane] {
                lanes[lane] = 0.0;
            }
        }
        Self(lanes)
    }

    #[inline(always)]
    fn power_of_two(self) -> Self {
        self.zip(self, |a, _| f32::from_bits((a.to_bits() << 23).wrapping_add(0x3f80_0000)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Exp<'a>(&'a [f32], &'a mut [f32]);

    impl Kernel for Exp<'_> {
        #[inline(always)]
        fn run<V: F32x16>(self) {
            for (x, y) in self.0.chunks_exact(LANES).zip(self.1.chunks_exact_mut(LANES)) {
                unsafe { V::load(x.as_ptr()).exp().store(y.as_mut_ptr()) };
            }
        }
    }

    fn exp(isa: Isa, x: &[f32]) -> Vec<f32> {
        let mut y = vec![0.0; x.len()];
        isa.run(Exp(x, &mut y));
        y
    }

    #[test]
    fn exp_is_within_two_units_and_bit_equal_on_every_instruction_set() {
        let x: Vec<f32> = (0..160_000).map(|i| -90.0 + i as f32 * (178.0 / 160_000.0)).collect();
        let best = exp(Isa::best(), &x);
        for isa in Isa::available() {
            let same = exp(isa, &x).iter().zip(&best).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{} differs from {}", isa.name(), Isa::best().name());
        }
        for (x, y) in x.iter().zip(&best).filter(|(x, _)| **x >= -87.3) {
            let exact = f64::from(*x).exp();
            let unit = f64::from(f32::EPSILON) / 2.0 * exact;
            assert!((f64::from(*y) - exact).abs() <= 4.0 * unit, "exp({x}) = {y}, not {exact}");
        }
    }

    #[test]
    fn exp_of_a_masked_score_is_zero_and_of_nan_is_nan() {
        for isa in Isa::available() {
            let mut x = [0.0; LANES];
            x[..3].copy_from_slice(&[f32::NEG_INFINITY, f32::NAN, -88.0]);
            let y = exp(isa, &x);
            assert_eq!((y[0], y[2], y[3]), (0.0, 0.0, 1.0));
            assert!(y[1].is_nan());
        }
    }
}
