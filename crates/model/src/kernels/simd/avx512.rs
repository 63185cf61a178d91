//! AVX-512: one register. The products of bytes are VNNI's, or made of pairs of 16 bits where it is missing.
//!
//! Safety, for every block below: a value exists only inside a function that [`Isa::run`](super::Isa::run)
//! chose because the processor has its features.

use std::arch::{asm, x86_64 as x86};

use super::{F16_MAX, F32x16, I32x16, LANES};

#[derive(Clone, Copy)]
pub struct Zmm<const VNNI: bool>(x86::__m512);

#[derive(Clone, Copy)]
pub struct ZmmIntegers<const VNNI: bool>(x86::__m512i);

/// Widens what it reads in one operation. The intrinsic asks for a conversion without exceptions, which the processor has only
/// between registers, and there it costs a shuffle besides: where keys meet three queries, a fifth of all operations.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_f16(from: *const u16) -> x86::__m512 {
    let numbers;
    unsafe {
        asm!(
            "vcvtph2ps {numbers}, ymmword ptr [{from}]",
            from = in(reg) from,
            numbers = lateout(zmm_reg) numbers,
            options(pure, readonly, nostack, preserves_flags)
        );
    }
    numbers
}

impl<const VNNI: bool> F32x16 for Zmm<VNNI> {
    const WIDE: bool = true;

    type Integers = ZmmIntegers<VNNI>;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self(unsafe { x86::_mm512_set1_ps(x) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(unsafe { x86::_mm512_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        Self(unsafe { load_f16(from) })
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        unsafe {
            let bits = x86::_mm512_cvtepu16_epi32(x86::_mm256_loadu_si256(from.cast()));
            Self(x86::_mm512_castsi512_ps(x86::_mm512_slli_epi32::<16>(bits)))
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { x86::_mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        let held = Self::splat(F16_MAX).min(Self::splat(-F16_MAX).max(self));
        unsafe {
            let halves = x86::_mm512_cvtps_ph::<{ x86::_MM_FROUND_TO_NEAREST_INT }>(held.0);
            x86::_mm256_storeu_si256(to.cast(), halves);
        }
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

    #[inline(always)]
    fn greatest(self) -> f32 {
        unsafe { x86::_mm512_reduce_max_ps(self.0) }
    }

    #[inline(always)]
    fn round(self) -> Self::Integers {
        ZmmIntegers(unsafe { x86::_mm512_cvtps_epi32(self.0) })
    }

    #[inline(always)]
    fn of_integers(integers: Self::Integers) -> Self {
        Self(unsafe { x86::_mm512_cvtepi32_ps(integers.0) })
    }
}

impl<const VNNI: bool> I32x16 for ZmmIntegers<VNNI> {
    type Weights = x86::__m512i;

    #[inline(always)]
    fn splat(x: i32) -> Self {
        Self(unsafe { x86::_mm512_set1_epi32(x) })
    }

    #[inline(always)]
    unsafe fn load_weights(from: *const u8) -> Self::Weights {
        unsafe { x86::_mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    fn low_nibbles(packed: Self::Weights) -> Self::Weights {
        unsafe { x86::_mm512_and_si512(packed, x86::_mm512_set1_epi8(15)) }
    }

    #[inline(always)]
    fn high_nibbles(packed: Self::Weights) -> Self::Weights {
        Self::low_nibbles(unsafe { x86::_mm512_srli_epi16::<4>(packed) })
    }

    #[inline(always)]
    fn encode(self) -> [[i32; LANES / 4]; 2] {
        if VNNI {
            unsafe {
                // Rounding to a multiple of 256 leaves a signed low byte.
                let carry = x86::_mm512_add_epi32(self.0, x86::_mm512_set1_epi32(128));
                let high = x86::_mm512_cvtepi32_epi8(x86::_mm512_srai_epi32::<8>(carry));
                let low = x86::_mm512_cvtepi32_epi8(self.0);
                [high, low].map(|bytes| std::mem::transmute::<x86::__m128i, [i32; LANES / 4]>(bytes))
            }
        } else {
            super::pairs(unsafe { std::mem::transmute::<x86::__m512i, [i32; LANES]>(self.0) })
        }
    }

    #[inline(always)]
    fn dot<const PART: usize>(self, weights: Self::Weights, word: i32) -> Self {
        unsafe {
            let activations = x86::_mm512_set1_epi32(word);
            if VNNI {
                return Self(x86::_mm512_dpbusd_epi32(self.0, weights, activations));
            }
            let weights = match PART {
                0 => x86::_mm512_and_si512(weights, x86::_mm512_set1_epi16(255)),
                _ => x86::_mm512_srli_epi16::<8>(weights),
            };
            Self(x86::_mm512_add_epi32(self.0, x86::_mm512_madd_epi16(weights, activations)))
        }
    }

    #[inline(always)]
    fn weigh_first(self) -> Self {
        if VNNI { Self(unsafe { x86::_mm512_slli_epi32::<8>(self.0) }) } else { self }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(unsafe { x86::_mm512_add_epi32(self.0, other.0) })
    }

    #[inline(always)]
    fn sum(self) -> i32 {
        unsafe { x86::_mm512_reduce_add_epi32(self.0) }
    }
}
