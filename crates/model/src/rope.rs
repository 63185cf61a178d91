//! Cosines and sines of the rotary position embedding, the same bits on every machine.
//!
//! The C library's sine differs in the last place between versions, and with it would every key and query;
//! the two polynomials here are those of FreeBSD's msun, in plain f64 operations.

use crate::config::Rope;

/// Angles of all positions of a context.
pub struct RopeTable {
    half: usize,
    /// (positions, half)
    cosine: Vec<f32>,
    sine: Vec<f32>,
}

impl RopeTable {
    /// Of positions `0..positions`.
    pub fn new(rope: &Rope, head_dim: usize, positions: usize) -> Self {
        // Rounded to f32, as in Hugging Face; it also hides how the library rounds a power.
        let frequencies: Vec<f64> =
            rope.frequencies(head_dim).into_iter().map(|frequency| f64::from(frequency as f32)).collect();
        let half = frequencies.len();
        let mut table = Self {
            half,
            cosine: Vec::with_capacity(positions * half),
            sine: Vec::with_capacity(positions * half),
        };
        for position in 0..positions {
            for frequency in &frequencies {
                let (sine, cosine) = sin_cos(position as f64 * frequency);
                table.sine.push(sine as f32);
                table.cosine.push(cosine as f32);
            }
        }
        table
    }

    /// All cosines and all sines, (positions, head_dim / 2) each: what another device takes.
    pub fn tables(&self) -> (&[f32], &[f32]) {
        (&self.cosine, &self.sine)
    }

    /// (cosines, sines) of one position, (head_dim / 2) each.
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let range = position * self.half..(position + 1) * self.half;
        (&self.cosine[range.clone()], &self.sine[range])
    }
}

/// (sin x, cos x) for 0 <= x < 2^20, within about one unit in the last place of f64.
fn sin_cos(x: f64) -> (f64, f64) {
    /// π/2 in two parts, the first of 33 bits, so that its product with a quadrant is exact.
    const HALF_PI_HIGH: f64 = 1.570_796_326_734_125_6;
    const HALF_PI_LOW: f64 = 6.077_100_506_506_192e-11;
    const SINE: [f64; 6] = [
        -1.666_666_666_666_663_2e-1,
        8.333_333_333_322_49e-3,
        -1.984_126_982_985_795e-4,
        2.755_731_370_707_006_8e-6,
        -2.505_076_025_340_686_3e-8,
        1.589_690_995_211_55e-10,
    ];
    const COSINE: [f64; 6] = [
        4.166_666_666_666_66e-2,
        -1.388_888_888_887_411e-3,
        2.480_158_728_947_673e-5,
        -2.755_731_435_139_066_3e-7,
        2.087_572_321_298_175e-9,
        -1.135_964_755_778_819_5e-11,
    ];
    let quadrant = (x * std::f64::consts::FRAC_2_PI + 0.5).floor();
    let r = (x - quadrant * HALF_PI_HIGH) - quadrant * HALF_PI_LOW;
    let square = r * r;
    let polynomial = |terms: &[f64; 6]| terms.iter().rev().fold(0.0, |sum, term| sum * square + term);
    let sine = r + r * square * polynomial(&SINE);
    let cosine = 1.0 - 0.5 * square + square * square * polynomial(&COSINE);
    match quadrant as u64 % 4 {
        0 => (sine, cosine),
        1 => (cosine, -sine),
        2 => (-sine, -cosine),
        _ => (-cosine, sine),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RopeScaling;

    #[test]
    fn angles_are_the_library_s_to_f32_precision_up_to_long_contexts() {
        let rope = Rope { theta: 10_000.0, scaling: RopeScaling::None };
        for x in (0..200_000).map(|i| f64::from(i) * 0.777) {
            let (sine, cosine) = sin_cos(x);
            assert!(
                (sine - x.sin()).abs() < 1e-15 && (cosine - x.cos()).abs() < 1e-15,
                "{x}: {sine} {cosine}"
            );
        }
        let table = RopeTable::new(&rope, 64, 100);
        let (cosine, sine) = table.at(99);
        assert_eq!((cosine.len(), sine.len()), (32, 32));
        assert_eq!((cosine[0], sine[0]), (99f64.cos() as f32, 99f64.sin() as f32));
    }
}
