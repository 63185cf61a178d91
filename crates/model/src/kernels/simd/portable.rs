//! Plain Rust: arrays, which the compiler vectorises for whatever it is told that the processor has.

use half::{bf16, f16};

use super::{F16_MAX, F32x16, I32x16, LANES};

#[derive(Clone, Copy)]
pub struct Portable([f32; LANES]);

#[derive(Clone, Copy)]
pub struct PortableIntegers([i32; LANES]);

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

    type Integers = PortableIntegers;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([x; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(unsafe { from.cast::<[f32; LANES]>().read() })
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        Self(
            unsafe { from.cast::<[u16; LANES]>().read_unaligned() }.map(|bits| f16::from_bits(bits).to_f32()),
        )
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        Self(
            unsafe { from.cast::<[u16; LANES]>().read_unaligned() }
                .map(|bits| bf16::from_bits(bits).to_f32()),
        )
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { to.cast::<[f32; LANES]>().write(self.0) }
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        let held = Self::splat(F16_MAX).min(Self::splat(-F16_MAX).max(self));
        let halves = held.0.map(|x| f16::from_f32(x).to_bits());
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(halves) }
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

    #[inline(always)]
    fn round(self) -> Self::Integers {
        PortableIntegers(self.0.map(|x| x.round_ties_even() as i32))
    }

    #[inline(always)]
    fn of_integers(integers: Self::Integers) -> Self {
        Self(integers.0.map(|x| x as f32))
    }
}

impl I32x16 for PortableIntegers {
    type Weights = [u8; 4 * LANES];

    #[inline(always)]
    fn splat(x: i32) -> Self {
        Self([x; LANES])
    }

    #[inline(always)]
    unsafe fn load_weights(from: *const u8) -> Self::Weights {
        unsafe { from.cast::<Self::Weights>().read() }
    }

    #[inline(always)]
    fn low_nibbles(packed: Self::Weights) -> Self::Weights {
        packed.map(|byte| byte & 15)
    }

    #[inline(always)]
    fn high_nibbles(packed: Self::Weights) -> Self::Weights {
        packed.map(|byte| byte >> 4)
    }

    #[inline(always)]
    fn encode(self) -> [[i32; LANES / 4]; 2] {
        super::pairs(self.0)
    }

    #[inline(always)]
    fn dot<const PART: usize>(self, weights: Self::Weights, word: i32) -> Self {
        let (first, second) = (word << 16 >> 16, word >> 16);
        let mut lanes = self.0;
        for lane in 0..LANES {
            lanes[lane] += i32::from(weights[4 * lane + PART]) * first;
            lanes[lane] += i32::from(weights[4 * lane + PART + 2]) * second;
        }
        Self(lanes)
    }

    #[inline(always)]
    fn weigh_first(self) -> Self {
        self
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        let mut lanes = self.0;
        for lane in 0..LANES {
            lanes[lane] += other.0[lane];
        }
        Self(lanes)
    }

    #[inline(always)]
    fn sum(self) -> i32 {
        self.0.iter().sum()
    }
}
