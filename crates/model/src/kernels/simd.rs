//! Sixteen lanes of f32 or i32 with the same bits on every instruction set.
//!
//! A kernel is written once against [`F32x16`] and compiled for AVX-512 with and without VNNI (one register),
//! AVX2 with FMA (two) and plain Rust (an array, which LLVM turns into NEON on ARM). All perform the same IEEE
//! operations in the same order — fused multiply-adds included, never contracted or reassociated — and
//! integer sums are exact in any order, so a number does not depend on the machine that computed it.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

#[cfg(target_arch = "x86_64")]
use avx2::Ymm;
#[cfg(target_arch = "x86_64")]
use avx512::Zmm;
use portable::Portable;

/// Lanes of a vector: positions of a cache block panel, output columns of a weight panel.
pub const LANES: usize = 16;

/// An instruction set that this processor has. Holding one is the proof that its kernels may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Kind);

/// Sixteen lanes of f32.
///
/// Implementations are private to this module: a kernel receives one through [`Isa::run`], which is why its
/// arithmetic needs no `unsafe`.
pub trait F32x16: Copy {
    /// 32 registers of 512 bits, so that 28 accumulators fit; else 16 of 256 bits, and 6 fit.
    const WIDE: bool;

    /// Integers in as many lanes.
    type Integers: I32x16;

    fn splat(x: f32) -> Self;

    /// # Safety
    /// `from` is readable for 16 floats; no alignment is needed.
    unsafe fn load(from: *const f32) -> Self;

    /// Sixteen numbers of IEEE half precision, exactly.
    ///
    /// # Safety
    /// `from` is readable for 16 of them; no alignment is needed.
    unsafe fn load_f16(from: *const u16) -> Self;

    /// Sixteen bfloat16, exactly.
    ///
    /// # Safety
    /// `from` is readable for 16 of them; no alignment is needed.
    unsafe fn load_bf16(from: *const u16) -> Self;

    /// # Safety
    /// `to` is writable for 16 floats; no alignment is needed.
    unsafe fn store(self, to: *mut f32);

    /// The nearest numbers of IEEE half precision, of ties the even one; beyond the greatest (65,504) that one.
    ///
    /// # Safety
    /// `to` is writable for 16 of them; no alignment is needed.
    unsafe fn store_f16(self, to: *mut u16);

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

    /// The nearest integers, of ties the even one; for numbers that have one within i32.
    fn round(self) -> Self::Integers;

    /// The nearest floats.
    fn of_integers(integers: Self::Integers) -> Self;

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

    /// The greatest lane; any if one is NaN, and a zero of either sign.
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

/// Sixteen lanes of i32, and their exact dot products: each lane sums four weights, unsigned bytes, times four
/// activations of 16 bits. The processors multiply either bytes or pairs of 16 bits, so four activations are
/// encoded as two words, one for each part of the product:
///
/// - VNNI: their high bytes (signed), and their low bytes (signed too: x = 256 · high + low);
/// - elsewhere: the first and third activation, and the second and fourth.
pub trait I32x16: Copy {
    /// 64 unsigned bytes, 4 for each lane.
    type Weights: Copy;

    fn splat(x: i32) -> Self;

    /// # Safety
    /// `from` is readable for 64 bytes; no alignment is needed.
    unsafe fn load_weights(from: *const u8) -> Self::Weights;

    /// The lower four bits of each byte.
    fn low_nibbles(packed: Self::Weights) -> Self::Weights;

    /// The upper four bits of each byte.
    fn high_nibbles(packed: Self::Weights) -> Self::Weights;

    /// Words of four activations for either part, from lanes of at least -32640 and at most 32639.
    fn encode(self) -> [[i32; LANES / 4]; 2];

    /// Adds the products of a part, 0 or 1, to every lane.
    fn dot<const PART: usize>(self, weights: Self::Weights, word: i32) -> Self;

    /// What the sums of part 0 count in the whole product.
    fn weigh_first(self) -> Self;

    fn add(self, other: Self) -> Self;

    /// Sum over the lanes.
    fn sum(self) -> i32;
}

/// The greatest number of half precision.
const F16_MAX: f32 = 65_504.0;

/// A computation that is compiled once per instruction set.
pub trait Kernel {
    /// Must be `#[inline(always)]`, and so must everything generic over `V` that it calls: the instructions
    /// are enabled in the function that it is inlined into.
    fn run<V: F32x16>(self);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Isa {
    /// What this processor has, the fastest first; never empty.
    pub fn available() -> Vec<Isa> {
        let mut kinds = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
                if is_x86_feature_detected!("avx512vnni") {
                    kinds.push(Kind::Avx512Vnni);
                }
                kinds.push(Kind::Avx512);
            }
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if avx2 && is_x86_feature_detected!("f16c") {
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
            Kind::Avx512Vnni => "avx512-vnni",
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
            Kind::Avx512Vnni => Zmm::<true>::WIDE,
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => Zmm::<false>::WIDE,
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
            Kind::Avx512Vnni => unsafe { run_avx512_vnni(kernel) },
            // Safety: as above.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => unsafe { run_avx512(kernel) },
            // Safety: as above.
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => unsafe { run_avx2(kernel) },
            Kind::Portable => kernel.run::<Portable>(),
        }
    }
}

/// [`I32x16::encode`] where products are of 16 bits.
#[inline(always)]
fn pairs(lanes: [i32; LANES]) -> [[i32; LANES / 4]; 2] {
    let (quads, _) = lanes.as_chunks::<4>();
    let word = |quad: usize, part: usize| quads[quad][part] & 0xffff | quads[quad][part + 2] << 16;
    [0, 1].map(|part| std::array::from_fn(|quad| word(quad, part)))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn run_avx512_vnni<K: Kernel>(kernel: K) {
    kernel.run::<Zmm<true>>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
fn run_avx512<K: Kernel>(kernel: K) {
    kernel.run::<Zmm<false>>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2<K: Kernel>(kernel: K) {
    kernel.run::<Ymm>()
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

    #[test]
    fn halves_are_rounded_to_the_nearest_and_held_at_the_greatest() {
        struct Round<'a>(&'a [f32; LANES], &'a mut [u16; LANES]);

        impl Kernel for Round<'_> {
            #[inline(always)]
            fn run<V: F32x16>(self) {
                unsafe { V::load(self.0.as_ptr()).store_f16(self.1.as_mut_ptr()) };
            }
        }

        // Ties to either side, what overflows, subnormal halves, what vanishes, and the signs of zero.
        let x = [
            0.0,
            -0.0,
            1.0,
            -1.0 / 3.0,
            2049.0,
            2051.0,
            65_504.0,
            65_519.0,
            65_520.0,
            1e9,
            -1e9,
            f32::INFINITY,
            6e-8,
            -3e-6,
            1e-9,
            f32::NAN,
        ];
        for isa in Isa::available() {
            let mut found = [0; LANES];
            isa.run(Round(&x, &mut found));
            for (x, found) in x.into_iter().zip(found.map(half::f16::from_bits)) {
                let expected = half::f16::from_f32(x.clamp(-65_504.0, 65_504.0));
                let same = found.to_bits() == expected.to_bits() || found.is_nan() && x.is_nan();
                assert!(same, "{}: {x} became {found}, not {expected}", isa.name());
            }
        }
    }

    /// Products and conversions against their definitions, lane by lane.
    struct Integers<'a> {
        weights: &'a [u8; 64],
        activations: &'a [f32; LANES],
        halves: &'a [u16; LANES],
        found: &'a mut Vec<i64>,
    }

    impl Kernel for Integers<'_> {
        #[inline(always)]
        fn run<V: F32x16>(self) {
            let integers = unsafe { V::load(self.activations.as_ptr()) }.round();
            let packed = unsafe { V::Integers::load_weights(self.weights.as_ptr()) };
            let words = integers.encode();
            for weights in [packed, V::Integers::low_nibbles(packed), V::Integers::high_nibbles(packed)] {
                for (first, second) in words[0].into_iter().zip(words[1]) {
                    let sums = V::Integers::splat(3).dot::<0>(weights, first).weigh_first();
                    let sums = sums.dot::<1>(weights, second).add(V::Integers::splat(-7));
                    self.found.extend(V::of_integers(sums).lanes().map(|lane| lane as i64));
                }
            }
            self.found.push(i64::from(integers.sum()));
            for floats in unsafe { [V::load_f16(self.halves.as_ptr()), V::load_bf16(self.halves.as_ptr())] } {
                self.found.extend(floats.lanes().map(|lane| i64::from(lane.to_bits())));
            }
        }
    }

    #[test]
    fn products_of_bytes_and_16_bits_are_exact_on_every_instruction_set() {
        let weights: [u8; 64] = std::array::from_fn(|i| (i * 89 % 251) as u8);
        let mut activations: [f32; LANES] = std::array::from_fn(|i| i as f32 * 4111.0 - 30_000.0);
        activations[..4].copy_from_slice(&[32_639.0, -32_639.0, 127.5, -128.5]);
        let halves: [u16; LANES] = std::array::from_fn(|i| (i * 4099 + 1) as u16 & 0xfbff);
        let rounded = activations.map(|x| x.round_ties_even() as i64);
        for isa in Isa::available() {
            let mut found = Vec::new();
            isa.run(Integers {
                weights: &weights,
                activations: &activations,
                halves: &halves,
                found: &mut found,
            });
            let mut expected = Vec::new();
            // What the sums start from counts once, or 256 times if it came before the high bytes.
            let start = if isa.name() == "avx512-vnni" { 3 * 256 } else { 3 };
            for nibble in [|w: u8| w, |w: u8| w & 15, |w: u8| w >> 4] {
                for quad in rounded.chunks_exact(4) {
                    expected.extend(weights.chunks_exact(4).map(|weights| {
                        let products = weights.iter().zip(quad).map(|(w, x)| i64::from(nibble(*w)) * x);
                        (start - 7 + products.sum::<i64>()) as f32 as i64
                    }));
                }
            }
            expected.push(rounded.iter().sum());
            let bits = |x: f32| i64::from(x.to_bits());
            expected.extend(halves.map(|x| bits(half::f16::from_bits(x).to_f32())));
            expected.extend(halves.map(|x| bits(half::bf16::from_bits(x).to_f32())));
            assert_eq!(found, expected, "{}", isa.name());
        }
    }
}
