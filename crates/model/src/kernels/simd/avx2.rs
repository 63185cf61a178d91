//! AVX2, FMA and F16C: two registers. Eight-bit products would saturate, so bytes are widened to 16 bits.
//!
//! Safety, for every block below: a value exists only inside a function that [`Isa::run`](super::Isa::run)
//! chose because the processor has its features.

use std::arch::x86_64 as x86;

use super::{F16_MAX, F32x16, I32x16, LANES};

#[derive(Clone, Copy)]
pub struct Ymm(x86::__m256, x86::__m256);

#[derive(Clone, Copy)]
pub struct YmmIntegers(x86::__m256i, x86::__m256i);

impl F32x16 for Ymm {
    const WIDE: bool = false;

    type Integers = YmmIntegers;

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
    unsafe fn load_f16(from: *const u16) -> Self {
        unsafe {
            let (low, high) = (x86::_mm_loadu_si128(from.cast()), x86::_mm_loadu_si128(from.add(8).cast()));
            Self(x86::_mm256_cvtph_ps(low), x86::_mm256_cvtph_ps(high))
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        unsafe {
            let widen = |half: *const u16| {
                let bits = x86::_mm256_cvtepu16_epi32(x86::_mm_loadu_si128(half.cast()));
                x86::_mm256_castsi256_ps(x86::_mm256_slli_epi32::<16>(bits))
            };
            Self(widen(from), widen(from.add(8)))
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe {
            x86::_mm256_storeu_ps(to, self.0);
            x86::_mm256_storeu_ps(to.add(8), self.1);
        }
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        let held = Self::splat(F16_MAX).min(Self::splat(-F16_MAX).max(self));
        unsafe {
            for (index, half) in [held.0, held.1].into_iter().enumerate() {
                let halves = x86::_mm256_cvtps_ph::<{ x86::_MM_FROUND_TO_NEAREST_INT }>(half);
                x86::_mm_storeu_si128(to.add(8 * index).cast(), halves);
            }
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

    #[inline(always)]
    fn round(self) -> Self::Integers {
        unsafe { YmmIntegers(x86::_mm256_cvtps_epi32(self.0), x86::_mm256_cvtps_epi32(self.1)) }
    }

    #[inline(always)]
    fn of_integers(integers: Self::Integers) -> Self {
        unsafe { Self(x86::_mm256_cvtepi32_ps(integers.0), x86::_mm256_cvtepi32_ps(integers.1)) }
    }
}

impl I32x16 for YmmIntegers {
    type Weights = (x86::__m256i, x86::__m256i);

    #[inline(always)]
    fn splat(x: i32) -> Self {
        let half = unsafe { x86::_mm256_set1_epi32(x) };
        Self(half, half)
    }

    #[inline(always)]
    unsafe fn load_weights(from: *const u8) -> Self::Weights {
        unsafe { (x86::_mm256_loadu_si256(from.cast()), x86::_mm256_loadu_si256(from.add(32).cast())) }
    }

    #[inline(always)]
    fn low_nibbles(packed: Self::Weights) -> Self::Weights {
        unsafe {
            let mask = x86::_mm256_set1_epi8(15);
            (x86::_mm256_and_si256(packed.0, mask), x86::_mm256_and_si256(packed.1, mask))
        }
    }

    #[inline(always)]
    fn high_nibbles(packed: Self::Weights) -> Self::Weights {
        unsafe {
            let shifted = (x86::_mm256_srli_epi16::<4>(packed.0), x86::_mm256_srli_epi16::<4>(packed.1));
            Self::low_nibbles(shifted)
        }
    }

    #[inline(always)]
    fn encode(self) -> [[i32; LANES / 4]; 2] {
        super::pairs(unsafe { std::mem::transmute::<[x86::__m256i; 2], [i32; LANES]>([self.0, self.1]) })
    }

    #[inline(always)]
    fn dot<const PART: usize>(self, weights: Self::Weights, word: i32) -> Self {
        unsafe {
            let activations = x86::_mm256_set1_epi32(word);
            let products = |weights: x86::__m256i| {
                let weights = match PART {
                    0 => x86::_mm256_and_si256(weights, x86::_mm256_set1_epi16(255)),
                    _ => x86::_mm256_srli_epi16::<8>(weights),
                };
                x86::_mm256_madd_epi16(weights, activations)
            };
            self.add(Self(products(weights.0), products(weights.1)))
        }
    }

    #[inline(always)]
    fn weigh_first(self) -> Self {
        self
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        unsafe { Self(x86::_mm256_add_epi32(self.0, other.0), x86::_mm256_add_epi32(self.1, other.1)) }
    }

    #[inline(always)]
    fn sum(self) -> i32 {
        let lanes = unsafe { std::mem::transmute::<[x86::__m256i; 2], [i32; LANES]>([self.0, self.1]) };
        lanes.iter().sum()
    }
}
