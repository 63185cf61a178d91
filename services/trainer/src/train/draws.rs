//! Everything that chance decides in training, as pure functions of (seed, step, place): the order of pairs, the
//! preferences, what dropout leaves out. So a resumed run, and a run of several workers, repeats it exactly.
//!
//! Words are Philox4x32-10 (crates/decode/src/noise.rs) with counter (block, place, step or epoch, stream).

use std::f64::consts::TAU;

use uniarm_decode::noise::philox4x32_10;

/// Streams do not meet each other, nor that of an adapter's initial values.
const ORDER: u32 = 0x4f52_4452;
const PREFERENCE: u32 = 0x5052_4546;
const DROPOUT: u32 = 0x4452_4f50;
const HELD_OUT: u32 = 0x4845_4c44;

/// Source of all draws of a run.
#[derive(Clone, Copy, Debug)]
pub struct Draws {
    key: [u32; 2],
}

/// An endless row of random words.
struct Words {
    key: [u32; 2],
    counter: [u32; 4],
}

// === impl Draws ===

impl Draws {
    pub fn new(seed: u64) -> Self {
        Self { key: halves(seed) }
    }

    /// The order in which an epoch sees `count` pairs (Fisher, Yates).
    pub fn order(&self, epoch: u64, count: usize) -> Vec<usize> {
        let mut words = self.words(0, epoch, ORDER);
        let mut order: Vec<usize> = (0..count).collect();
        for last in (1..count).rev() {
            order.swap(last, words.below(last as u64 + 1) as usize);
        }
        order
    }

    /// A preference from the symmetric Dirichlet distribution: gamma variates over their sum.
    pub fn preference(&self, step: u64, place: u32, objectives: usize, concentration: f64) -> Vec<f32> {
        let mut words = self.words(place, step, PREFERENCE);
        // As logarithms: at small concentrations the variates themselves underflow.
        let logs: Vec<f64> = (0..objectives).map(|_| words.log_gamma(concentration)).collect();
        let top = logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = logs.iter().map(|log| (log - top).exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.iter().map(|weight| (weight / sum) as f32).collect()
    }

    /// What decides the dropout of one sample.
    pub fn dropout(&self, step: u64, place: u32) -> u64 {
        self.words(place, step, DROPOUT).next_u64()
    }

    /// A number for each conversation, by its digest: those with the lowest are held out.
    pub fn held_out(&self, digest: u64) -> u64 {
        self.words(0, digest, HELD_OUT).next_u64()
    }

    /// `step` fills one counter; what it has above 32 bits goes to the key, as a run that long needs none of its own.
    fn words(&self, place: u32, step: u64, stream: u32) -> Words {
        let [low, high] = halves(step);
        Words { key: [self.key[0], self.key[1] ^ high], counter: [0, place, low, stream] }
    }
}

fn halves(number: u64) -> [u32; 2] {
    [number as u32, (number >> 32) as u32]
}

// === impl Words ===

impl Words {
    fn next_u64(&mut self) -> u64 {
        let [low, high, ..] = philox4x32_10(self.counter, self.key);
        self.counter[0] += 1;
        u64::from(high) << 32 | u64::from(low)
    }

    /// Below `bound`; the bias of a product of 64 bits is below 2⁻⁴⁰ for any number of pairs.
    fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(bound)) >> 64) as u64
    }

    /// In (0, 1), at the middles of 2⁵² cells.
    fn uniform(&mut self) -> f64 {
        ((self.next_u64() >> 12) as f64 + 0.5) / (1_u64 << 52) as f64
    }

    /// Box, Muller; the second of the two is not kept, as there is no state to keep it in.
    fn normal(&mut self) -> f64 {
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        radius * (TAU * self.uniform()).cos()
    }

    /// Logarithm of a gamma variate (Marsaglia, Tsang: *A simple method for generating gamma variables*, 2000).
    fn log_gamma(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            return self.log_gamma(shape + 1.0) + self.uniform().ln() / shape;
        }
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let x = self.normal();
            let v = (1.0 + c * x).powi(3);
            if v > 0.0 && self.uniform().ln() < 0.5 * x * x + d * (1.0 - v + v.ln()) {
                return (d * v).ln();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_a_permutation_and_depends_on_seed_and_epoch() {
        let order = Draws::new(7).order(0, 100);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<_>>());
        assert_eq!(order, Draws::new(7).order(0, 100));
        assert_ne!(order, Draws::new(7).order(1, 100));
        assert_ne!(order, Draws::new(8).order(0, 100));
    }

    #[test]
    fn preferences_have_the_moments_of_the_dirichlet_distribution() {
        let draws = Draws::new(1);
        for concentration in [0.05, 0.5, 2.0] {
            let samples: Vec<Vec<f32>> =
                (0..20_000).map(|place| draws.preference(3, place, 3, concentration)).collect();
            let mean = samples.iter().map(|p| f64::from(p[0])).sum::<f64>() / 20_000.0;
            let squares = samples.iter().map(|p| f64::from(p[0]).powi(2)).sum::<f64>() / 20_000.0;
            // Mean 1/k, variance (k − 1) / (k² (kα + 1)).
            let variance = 2.0 / (9.0 * (3.0 * concentration + 1.0));
            assert!((mean - 1.0 / 3.0).abs() < 0.01, "{concentration}: mean {mean}");
            let measured = squares - mean * mean;
            assert!((measured - variance).abs() < 0.03 * variance, "{concentration}: {measured} {variance}");
            assert!(samples.iter().all(|p| (p.iter().sum::<f32>() - 1.0).abs() < 1e-6));
        }
        assert_eq!(draws.preference(0, 0, 1, 0.5), [1.0]);
    }
}
