//! The noise that stands for chance: a pure function of (seed, choice, position, token id).
//!
//! One page, so that any worker, in any language, on a CPU or a GPU, can compute the same number.
//!
//! **Bits.** h(seed, choice, position, token) is word `token % 4` of Philox4x32-10 (Salmon, Moraes, Dror,
//! Shaw: *Parallel random numbers: as easy as 1, 2, 3*, SC 2011) with
//!
//! ```text
//! key     = (low 32 bits of seed, high 32 bits of seed)
//! counter = (token / 4, position, choice, 0)
//! ```
//!
//! **Gumbel.** With x = (h + ½)·2⁻³², uniform on (0, 1), G = −ln(−ln(1 − x)) is standard Gumbel noise: the
//! argmax of logit/T + G is an exact sample of softmax(logit/T) (the Gumbel-max trick). The inner logarithm
//! takes 1 − x, not x, so that the *upper* tail, which decides, comes from small x, where `f32` has all its
//! resolution: the largest noise is G = 33·ln 2 ≈ 22.9 at h = 0, never infinity, while −ln(−ln x) in `f32`
//! is infinite once in 2²⁵ tokens. For x ≥ 0.2929 the complement 1 − x = (!h + ½)·2⁻³² is taken from the
//! bits, exactly.
//!
//! **Arithmetic.** Every operation is one rounded `f32` operation in the order written here, without the C
//! library and without fused operations: the noise is the same bits everywhere, alone ([`Noise::at`]) or in
//! rows ([`Noise::fill`]). Run through all 2³² words, it never rises from a word to the next, and is within
//! 1e-6 of the exact value.

use crate::elementary::{ln_of, split};

/// Words that one round of the vectorised generator makes: 16 counters of 4 words.
pub(crate) const BLOCK: usize = 64;
/// The largest value of the noise is 33·ln 2; this bounds it.
pub const NOISE_MAX: f32 = 22.9;
/// The least is −3.13.
pub(crate) const NOISE_MIN: f32 = -3.2;

/// Of [`bound_steps`]. The slack of 1e-3 is a hundred times what the roundings there and in [`gumbel`] add up to.
pub(crate) const BOUND_OF_ZERO: f32 = (127.0 + 31.0) * std::f32::consts::LN_2 + 1e-3;
pub(crate) const BOUND_STEP: f32 = std::f32::consts::LN_2 / 8_388_608.0;

const COUNTERS: usize = BLOCK / 4;
const ROUNDS: u32 = 10;
const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
const KEY_STEPS: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];

/// The noise of one answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Noise {
    key: [u32; 2],
    choice: u32,
}

/// Philox4x32 with ten rounds.
pub fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..ROUNDS {
        let left = u64::from(MULTIPLIERS[0]) * u64::from(c0);
        let right = u64::from(MULTIPLIERS[1]) * u64::from(c2);
        (c0, c1, c2, c3) =
            ((right >> 32) as u32 ^ c1 ^ k0, right as u32, (left >> 32) as u32 ^ c3 ^ k1, left as u32);
        k0 = k0.wrapping_add(KEY_STEPS[0]);
        k1 = k1.wrapping_add(KEY_STEPS[1]);
    }
    [c0, c1, c2, c3]
}

impl Noise {
    /// `choice` tells the independent answers to one request apart.
    pub const fn new(seed: u64, choice: u32) -> Self {
        Self { key: [seed as u32, (seed >> 32) as u32], choice }
    }

    pub const fn seed(&self) -> u64 {
        (self.key[1] as u64) << 32 | self.key[0] as u64
    }

    pub const fn choice(&self) -> u32 {
        self.choice
    }

    /// G of the token ids 0..out.len() at a position of the answer.
    pub fn fill(&self, position: u32, out: &mut [f32]) {
        fill(self, position, out);
    }

    /// G of one token id: the same bits as in [`Noise::fill`].
    pub fn at(&self, position: u32, token: u32) -> f32 {
        let words = philox4x32_10([token / 4, position, self.choice, 0], self.key);
        gumbel(words[token as usize % 4])
    }

    /// The random words of the tokens first..first + BLOCK; `first` is a multiple of four.
    ///
    /// [`philox4x32_10`] on sixteen counters at once. The halves of a counter live in 64-bit lanes whose
    /// upper half is left dirty: the product of the lower halves is one instruction, and reads nothing else.
    #[inline(always)]
    pub(crate) fn words(&self, position: u32, first: u32) -> [u32; BLOCK] {
        const LOW: u64 = 0xffff_ffff;
        const STEPS: [u64; COUNTERS] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
        let mut c0: [u64; COUNTERS] = STEPS.map(|step| step.wrapping_add(u64::from(first / 4)));
        let mut c1 = [u64::from(position); COUNTERS];
        let mut c2 = [u64::from(self.choice); COUNTERS];
        let mut c3 = [0_u64; COUNTERS];
        let [mut k0, mut k1] = self.key;
        for _ in 0..ROUNDS {
            for i in 0..COUNTERS {
                let left = u64::from(MULTIPLIERS[0]).wrapping_mul(c0[i] & LOW);
                let right = u64::from(MULTIPLIERS[1]).wrapping_mul(c2[i] & LOW);
                c0[i] = (right >> 32) ^ c1[i] ^ u64::from(k0);
                c1[i] = right;
                c2[i] = (left >> 32) ^ c3[i] ^ u64::from(k1);
                c3[i] = left;
            }
            k0 = k0.wrapping_add(KEY_STEPS[0]);
            k1 = k1.wrapping_add(KEY_STEPS[1]);
        }
        let mut pairs = [0_u64; 2 * COUNTERS];
        for i in 0..COUNTERS {
            pairs[2 * i] = (c0[i] & LOW) | (c1[i] << 32);
            pairs[2 * i + 1] = (c2[i] & LOW) | (c3[i] << 32);
        }
        let mut words = [0; BLOCK];
        for (words, pair) in words.as_chunks_mut::<2>().0.iter_mut().zip(pairs) {
            *words = [pair as u32, (pair >> 32) as u32];
        }
        words
    }
}

widest! {
    fn fill(noise: &Noise, position: u32, out: &mut [f32]) {
        let mut first = 0;
        for block in out.chunks_mut(BLOCK) {
            let words = noise.words(position, first);
            for (noise, &word) in block.iter_mut().zip(&words) {
                *noise = gumbel(word);
            }
            first += BLOCK as u32;
        }
    }
}

/// G = −ln(−ln(1 − x)), x = (h + ½)·2⁻³².
#[inline(always)]
pub(crate) fn gumbel(h: u32) -> f32 {
    const UNIT: f32 = 1.0 / 4_294_967_296.0;
    /// Below, 1 − x is in [√½, 1), and ln(1 − x) wants −x itself.
    const NEAR_ZERO: f32 = 0.292_893_2;
    let x = (h as f32 + 0.5) * UNIT;
    let complement = (!h as f32 + 0.5) * UNIT;
    let (mantissa, exponent) = split(complement);
    let near = x < NEAR_ZERO;
    let f = if near { -x } else { mantissa - 1.0 };
    let e = if near { 0.0 } else { exponent };
    let exponential = -ln_of(f, e); // standard exponential
    let (mantissa, exponent) = split(exponential);
    -ln_of(mantissa - 1.0, exponent)
}

/// Bounds [`gumbel`] of the same word, for a tenth of its cost: it never exceeds [`BOUND_OF_ZERO`] less so many
/// [`BOUND_STEP`]s.
///
/// −ln(1 − x) ≥ x gives G ≤ −ln x, and the bits of a float read as an integer are its logarithm interpolated linearly
/// between powers of two, hence too low by at most 0.0861: −ln x ≤ 127·ln 2 − bits of x · ln 2·2⁻²³. Here they are the bits of
/// h / 2 = 2³¹·x.
#[inline(always)]
pub(crate) fn bound_steps(h: u32) -> f32 {
    ((h >> 1) as i32 as f32).to_bits() as i32 as f32 // signed: SSE2 converts no other
}

#[cfg(test)]
mod tests {
    use super::*;

    /// kat_vectors of the Random123 distribution, philox4x32 with 10 rounds.
    #[test]
    fn philox_gives_the_published_answers() {
        let zeros = philox4x32_10([0; 4], [0; 2]);
        assert_eq!(zeros, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        let ones = philox4x32_10([u32::MAX; 4], [u32::MAX; 2]);
        assert_eq!(ones, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi =
            philox4x32_10([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]);
        assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    /// Recorded from a transcription of this module into Python integers and rounded operations.
    #[test]
    fn the_noise_has_the_recorded_bits() {
        let recorded = [
            (0, 0, 0, 0, 0x3f2c_c257),
            (0, 0, 0, 1, 0xbf40_eb18),
            (0, 0, 0, 2, 0xbe92_49cd),
            (0, 0, 0, 3, 0x3d94_6d1a),
            (1, 0, 0, 0, 0xbf4a_f6b3),
            (1 << 32, 0, 0, 0, 0xbfc8_779d),
            (0, 1, 0, 0, 0x3ea3_3013),
            (0, 0, 1, 0, 0x3f1d_bf22),
            (0x0123_4567_89ab_cdef, 2, 1000, 49_151, 0xbf0a_d869),
            (u64::MAX, u32::MAX, u32::MAX, u32::MAX, 0x3fc3_db7f),
        ];
        for (seed, choice, position, token, bits) in recorded {
            let g = Noise::new(seed, choice).at(position, token);
            assert_eq!(
                g.to_bits(),
                bits,
                "seed {seed}, choice {choice}, position {position}, token {token}: {g}"
            );
        }
        // The ends, the middle, and the two words between which the complement takes over.
        let words = [0, 1, 0x4afb_0ccc, 0x4afb_0ccd, 0x7fff_ffff, 0x8000_0000, 0xffff_fffe, 0xffff_ffff];
        let bits = [
            0x41b6_fda9,
            0x41ae_33b3,
            0x3f87_a2f1,
            0x3f87_a2f1,
            0x3ebb_a795,
            0x3ebb_a795,
            0xc045_2b66,
            0xc048_51d5,
        ];
        assert_eq!(words.map(|word| gumbel(word).to_bits()), bits);
    }

    #[test]
    fn a_row_of_noise_is_the_noise_of_its_tokens() {
        let noise = Noise::new(0x0123_4567_89ab_cdef, 3);
        for length in [0, 1, 5, 63, 64, 65, 1000] {
            let mut row = vec![0.0; length];
            noise.fill(17, &mut row);
            for (token, g) in row.iter().enumerate() {
                assert_eq!(g.to_bits(), noise.at(17, token as u32).to_bits(), "token {token} of {length}");
            }
        }
    }

    #[test]
    fn noise_is_finite_right_and_monotone_from_the_first_word_to_the_last() {
        let mut last = f32::INFINITY;
        let near_the_ends_and_between = (0..100_000_u32)
            .chain((100_000..u32::MAX - 100_000).step_by(9973))
            .chain(u32::MAX - 100_000..=u32::MAX);
        for h in near_the_ends_and_between {
            let g = gumbel(h);
            let x = (f64::from(h) + 0.5) / 4_294_967_296.0;
            let exact = -(-(-x).ln_1p()).ln();
            assert!((f64::from(g) - exact).abs() < 2e-6, "G({h}) = {g}, not {exact}");
            assert!(g <= last, "G rises at {h}");
            let bound = BOUND_OF_ZERO - bound_steps(h) * BOUND_STEP;
            assert!(g <= bound && (NOISE_MIN..=NOISE_MAX).contains(&g), "G({h}) = {g} passes its bound");
            last = g;
        }
    }

    #[test]
    fn gumbel_max_samples_softmax() {
        const SAMPLES: u32 = 200_000;
        let logits: Vec<f32> = (0..40).map(|i| ((i * 7) % 40) as f32 / 10.0 - 2.0).collect();
        let total: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
        let noise = Noise::new(20_260_209, 0);
        let mut row = vec![0.0; logits.len()];
        let mut counts = vec![0_u32; logits.len()];
        for position in 0..SAMPLES {
            noise.fill(position, &mut row);
            let score = |v: &usize| logits[*v] + row[*v];
            let best = (0..logits.len()).max_by(|a, b| score(a).total_cmp(&score(b))).unwrap();
            counts[best] += 1;
        }
        let chi_square: f64 = logits
            .iter()
            .zip(&counts)
            .map(|(&l, &count)| {
                let expected = f64::from(SAMPLES) * f64::from(l).exp() / total;
                (f64::from(count) - expected).powi(2) / expected
            })
            .sum();
        // 39 degrees of freedom: 72.1 is exceeded once in a thousand.
        assert!(chi_square < 72.1, "chi-square {chi_square}");
    }
}
