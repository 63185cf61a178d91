//! What a front is worth [method §4]: hypervolume, mean inner product, and how sure we are of them.
//!
//! A *front* has one point for each preference of a grid: the mean score of the answers, one number per objective.

mod bootstrap;
mod hypervolume;

pub use bootstrap::{Bootstrap, Interval};
pub use hypervolume::hypervolume;
pub use uniarm_batch::lattice;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inner_product_is_the_mean_over_the_grid() {
        let preferences = [vec![0.0, 1.0], vec![1.0, 0.0], vec![0.5, 0.5]];
        let points = [vec![9.0, 1.0], vec![2.0, 9.0], vec![4.0, 2.0]];
        assert!((mean_inner_product(&preferences, &points) - 2.0).abs() < 1e-12);
    }
}
