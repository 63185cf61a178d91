//! What a front is worth [method §4]: hypervolume, mean inner product, and how sure we are of them.
//!
//! A *front* has one point for each preference of a grid: the mean score of the answers, one number per objective.

mod bootstrap;
mod hypervolume;

pub use bootstrap::{Bootstrap, Front, FrontIntervals, Interval, dominates, front_intervals};
pub use hypervolume::hypervolume;
pub use uniarm_batch::lattice;

/// Least and largest value of each objective, over whatever is compared: what normalising needs.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Ranges {
    pub low: Vec<f64>,
    pub high: Vec<f64>,
}

/// MIP: the mean of ⟨p, q(p)⟩ over the grid. Zero for an empty grid.
///
/// # Panics
/// Where there is not one point for each preference.
pub fn mean_inner_product(preferences: &[Vec<f32>], points: &[Vec<f64>]) -> f64 {
    assert_eq!(preferences.len(), points.len(), "one point for each preference");
    let product = |(preference, point): (&Vec<f32>, &Vec<f64>)| -> f64 {
        preference.iter().zip(point).map(|(weight, value)| f64::from(*weight) * value).sum()
    };
    preferences.iter().zip(points).map(product).sum::<f64>() / points.len().max(1) as f64
}

/// Steps from one point to the next, along a grid on which the weight of `objective` rises, that raise its score.
pub fn rising_steps(points: &[Vec<f64>], objective: usize) -> usize {
    points.windows(2).filter(|pair| pair[1][objective] > pair[0][objective]).count()
}

/// As [`rising_steps`], where the weight falls: steps that lower the score.
pub fn falling_steps(points: &[Vec<f64>], objective: usize) -> usize {
    points.windows(2).filter(|pair| pair[1][objective] < pair[0][objective]).count()
}

// === impl Ranges ===

impl Ranges {
    /// Over all points of all fronts; none where there is no point.
    pub fn of<'a>(points: impl IntoIterator<Item = &'a Vec<f64>>) -> Option<Self> {
        let mut points = points.into_iter();
        let first = points.next()?;
        let mut ranges = Self { low: first.clone(), high: first.clone() };
        for point in points {
            for (objective, value) in point.iter().enumerate() {
                ranges.low[objective] = ranges.low[objective].min(*value);
                ranges.high[objective] = ranges.high[objective].max(*value);
            }
        }
        Some(ranges)
    }

    /// Least to 0, largest to 1; an objective that never changes to 0.
    pub fn normalise(&self, points: &[Vec<f64>]) -> Vec<Vec<f64>> {
        let scaled = |(objective, value): (usize, &f64)| {
            let width = self.high[objective] - self.low[objective];
            if width > 0.0 { (value - self.low[objective]) / width } else { 0.0 }
        };
        points.iter().map(|point| point.iter().enumerate().map(scaled).collect()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inner_product_is_the_mean_over_the_grid() {
        let preferences = [vec![0.0, 1.0], vec![1.0, 0.0], vec![0.5, 0.5]];
        let points = [vec![9.0, 1.0], vec![2.0, 9.0], vec![4.0, 2.0]];
        assert!((mean_inner_product(&preferences, &points) - 2.0).abs() < 1e-12);
    }

    #[test]
    fn normalised_points_lie_in_the_unit_cube_of_all_fronts() {
        let fronts = [[vec![1.0, 5.0], vec![3.0, 5.0]], [vec![2.0, 5.0], vec![5.0, 5.0]]];
        let ranges = Ranges::of(fronts.iter().flatten()).unwrap();
        assert_eq!(ranges.normalise(&fronts[0]), [[0.0, 0.0], [0.5, 0.0]]);
        assert_eq!(Ranges::of([]), None);
    }

    #[test]
    fn a_flat_step_is_no_step_in_the_right_direction() {
        let points = [vec![1.0, 4.0], vec![2.0, 4.0], vec![1.5, 3.0], vec![1.8, 2.0]];
        assert_eq!((rising_steps(&points, 0), falling_steps(&points, 1)), (2, 2));
    }
}
