//! Intervals over prompts: what the numbers of a front would have been with other prompts of the same kind.
//!
//! Prompts are drawn with replacement, jointly for all preferences, objectives and methods: the same draw computes
//! every point, the hypervolume and the inner product, so that what they have in common cancels in comparisons. Draws
//! come from the counter-based generator of the tokens: equal arguments give equal intervals on every machine.

use uniarm_decode::noise::philox4x32_10;

use super::{Ranges, hypervolume, mean_inner_product};

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

/// What was measured of one method.
#[derive(Clone, Copy, Debug)]
pub struct Front<'a> {
    pub preferences: &'a [Vec<f32>],
    /// `scores[preference][prompt][objective]`; the same prompts for every preference.
    pub scores: &'a [Vec<Vec<f64>>],
}

/// A front with its intervals.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct FrontIntervals {
    /// `points[preference][objective]`
    pub points: Vec<Vec<Interval>>,
    pub hypervolume: Interval,
    pub mean_inner_product: Interval,
    /// Over min–max normalised points.
    pub normalised_inner_product: Interval,
}

/// Points, hypervolume and inner products of a front with their intervals. The reference point and the ranges
/// stay as they are in every draw.
pub fn front_intervals(
    front: Front<'_>,
    reference: &[f64],
    ranges: &Ranges,
    bootstrap: Bootstrap,
) -> FrontIntervals {
    let prompts = front.scores.first().map_or(0, Vec::len);
    let numbers = bootstrap.intervals(prompts, |drawn| {
        let points = front.points(drawn);
        let normalised = ranges.normalise(&points);
        let mut numbers = vec![
            hypervolume(&points, reference),
            mean_inner_product(front.preferences, &points),
            mean_inner_product(front.preferences, &normalised),
        ];
        numbers.extend(points.into_iter().flatten());
        numbers
    });
    FrontIntervals {
        points: numbers[3..].chunks(reference.len()).map(<[Interval]>::to_vec).collect(),
        hypervolume: numbers[0],
        mean_inner_product: numbers[1],
        normalised_inner_product: numbers[2],
    }
}

/// Whether some point of a front is better than `point` in every objective, beyond doubt: with intervals that do not
/// touch.
pub fn dominates(front: &[Vec<Interval>], point: &[Interval]) -> bool {
    front.iter().any(|better| better.iter().zip(point).all(|(a, b)| a.low > b.high))
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

// === impl Front ===

impl Front<'_> {
    /// Mean scores over the drawn prompts, one point for each preference.
    pub fn points(&self, drawn: &[usize]) -> Vec<Vec<f64>> {
        let point = |scores: &Vec<Vec<f64>>| {
            let objectives = scores.first().map_or(0, Vec::len);
            let mean = |objective| {
                drawn.iter().map(|&prompt| scores[prompt][objective]).sum::<f64>() / drawn.len().max(1) as f64
            };
            (0..objectives).map(mean).collect()
        };
        self.scores.iter().map(point).collect()
    }
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
    fn front_is_drawn_as_a_whole() {
        // One hard prompt moves all points together: the difference of two points has no spread at all.
        let preferences = vec![vec![0.0, 1.0], vec![1.0, 0.0]];
        let prompt = |shift: f64, i: u32| vec![f64::from(i % 7) + shift, f64::from(i % 7) - shift];
        let scores: Vec<Vec<Vec<f64>>> =
            [0.0, 2.0].iter().map(|&shift| (0..40).map(|i| prompt(shift, i)).collect()).collect();
        let front = Front { preferences: &preferences, scores: &scores };
        let difference = |drawn: &[usize]| {
            let points = front.points(drawn);
            vec![points[1][0] - points[0][0]]
        };
        let interval = BOOTSTRAP.intervals(40, difference)[0];
        assert!((interval.low - 2.0).abs() < 1e-9 && (interval.high - 2.0).abs() < 1e-9);

        let ranges = Ranges { low: vec![0.0, 0.0], high: vec![10.0, 10.0] };
        let found = front_intervals(front, &[-3.0, -3.0], &ranges, BOOTSTRAP);
        let all: Vec<usize> = (0..40).collect();
        let points = front.points(&all);
        assert_eq!(found.points[1][0].value, points[1][0]);
        assert_eq!(found.hypervolume.value, hypervolume(&points, &[-3.0, -3.0]));
        assert!(found.hypervolume.low < found.hypervolume.value);
        assert!(found.mean_inner_product.high > found.mean_inner_product.value);
        let scaled = found.mean_inner_product.value / 10.0;
        assert!((found.normalised_inner_product.value - scaled).abs() < 1e-6);
    }

    #[test]
    fn dominance_needs_intervals_that_do_not_touch() {
        let interval = |low, high| Interval { value: (low + high) / 2.0, low, high };
        let base = [interval(0.0, 1.0), interval(0.0, 1.0)];
        let better = vec![interval(1.1, 2.0), interval(1.2, 1.4)];
        let doubtful = vec![interval(1.1, 2.0), interval(0.9, 3.0)];
        assert!(dominates(&[doubtful.clone(), better], &base));
        assert!(!dominates(&[doubtful], &base));
        assert!(!dominates(&[], &base));
    }
}
