//! Intervals over prompts: what the numbers of a front would have been with other prompts of the same kind.
//!
//! Prompts are drawn with replacement, jointly for all preferences, objectives and methods: the same draw computes
//! every point, the hypervolume and the inner product, so that what they have in common cancels in comparisons. Draws
//! come from the counter-based generator of the tokens: equal arguments give equal intervals on every machine.

use uniarm_decode::noise::philox4x32_10;

/// Tells these draws apart from the noise of tokens under the same seed.
const PURPOSE: u32 = 0x626f_6f74;

/// How prompts are drawn.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Bootstrap {
    pub resamples: u32,
    /// Share of the draws that an interval holds, 0.95 for instance.
    pub level: f64,
    pub seed: u64,
}

/// A number from all prompts, and the percentile interval around it.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Interval {
    pub value: f64,
    pub low: f64,
    pub high: f64,
}

// === impl Bootstrap ===

impl Bootstrap {
    /// Intervals of every number that `statistic` computes from drawn prompts, given as indices below `prompts`. It
    /// is asked first about all prompts as they are, then about each draw, and always gives as many numbers.
    pub fn intervals(&self, prompts: usize, statistic: impl Fn(&[usize]) -> Vec<f64>) -> Vec<Interval> {
        let values = statistic(&(0..prompts).collect::<Vec<_>>());
        let mut draws = vec![Vec::with_capacity(self.resamples as usize); values.len()];
        for resample in 0..self.resamples {
            let drawn = statistic(&self.draw(resample, prompts));
            draws.iter_mut().zip(drawn).for_each(|(draws, number)| draws.push(number));
        }
        let tail = (1.0 - self.level) / 2.0;
        let interval = |(value, mut draws): (f64, Vec<f64>)| {
            draws.sort_by(f64::total_cmp);
            let at = |share| quantile(&draws, share).unwrap_or(value);
            Interval { value, low: at(tail), high: at(1.0 - tail) }
        };
        values.into_iter().zip(draws).map(interval).collect()
    }

    /// As many indices below `prompts`, drawn with replacement.
    fn draw(&self, resample: u32, prompts: usize) -> Vec<usize> {
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        let index = |slot: usize| {
            let words = philox4x32_10([(slot / 4) as u32, resample, 0, PURPOSE], key);
            // The high half of a product is uniform to within prompts/2³².
            ((u64::from(words[slot % 4]) * prompts as u64) >> 32) as usize
        };
        (0..prompts).map(index).collect()
    }
}

/// Linear between neighbours; none of nothing.
fn quantile(sorted: &[f64], share: f64) -> Option<f64> {
    let place = share * sorted.len().checked_sub(1)? as f64;
    let below = sorted[place.floor() as usize];
    Some(below + (place - place.floor()) * (sorted[place.ceil() as usize] - below))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOTSTRAP: Bootstrap = Bootstrap { resamples: 2000, level: 0.95, seed: 11 };

    /// A mean of fifty is nearly normal: ± 1.96 σ/√n, with σ² = (50² − 1)/12 of the numbers 0 to 49.
    #[test]
    fn interval_of_a_mean_is_the_normal_one() {
        let numbers: Vec<f64> = (0..50).map(|i| f64::from(i * 37 % 50)).collect();
        let mean = |drawn: &[usize]| {
            vec![drawn.iter().map(|&index| numbers[index]).sum::<f64>() / drawn.len() as f64]
        };
        let interval = BOOTSTRAP.intervals(50, mean)[0];
        let half = 1.96 * (2499.0_f64 / 12.0).sqrt() / 50_f64.sqrt();
        assert_eq!(interval.value, 24.5);
        assert!((interval.low - (24.5 - half)).abs() < 0.3 && (interval.high - (24.5 + half)).abs() < 0.3);
        assert_eq!(interval, BOOTSTRAP.intervals(50, mean)[0], "the same draws again");
        let other = Bootstrap { seed: 12, ..BOOTSTRAP };
        assert_ne!(interval, other.intervals(50, mean)[0]);
    }

    #[test]
    fn numbers_of_one_statistic_are_drawn_together() {
        // One hard prompt moves both numbers: their difference has no spread at all.
        let scores: Vec<f64> = (0..40).map(|i| f64::from(i % 7)).collect();
        let difference = |drawn: &[usize]| {
            let mean =
                |shift: f64| drawn.iter().map(|&i| scores[i] + shift).sum::<f64>() / drawn.len() as f64;
            vec![mean(2.0) - mean(0.0)]
        };
        let interval = BOOTSTRAP.intervals(40, difference)[0];
        assert!((interval.low - 2.0).abs() < 1e-9 && (interval.high - 2.0).abs() < 1e-9);
    }
}
