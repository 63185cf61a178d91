//! The hypervolume: measure of the region that points dominate above a reference point.

/// Points and reference have the same number of objectives, higher is better, all finite. A point that is not above
/// the reference in every objective dominates nothing there. Exact for any number of objectives: two by a sweep, more by
/// exclusive contributions (While, Bradstreet, Barone: *A fast way of calculating exact hypervolumes*, 2012).
///
/// # Panics
/// Where a point has another number of objectives than the reference.
pub fn hypervolume(points: &[Vec<f64>], reference: &[f64]) -> f64 {
    let above = |point: &Vec<f64>| -> Vec<f64> {
        assert_eq!(point.len(), reference.len(), "a point has a value for each objective of the reference");
        point.iter().zip(reference).map(|(value, least)| value - least).collect()
    };
    // From here on the reference is the origin.
    let points = points.iter().map(above).filter(|point| point.iter().all(|value| *value > 0.0)).collect();
    volume(points, reference.len())
}

fn volume(points: Vec<Vec<f64>>, objectives: usize) -> f64 {
    match objectives {
        0 => 0.0,
        1 => points.iter().map(|point| point[0]).fold(0.0, f64::max),
        2 => sweep(points),
        _ => {
            let mut points = undominated(points);
            // The points that come last are limited by the fewest others; low ones limit the most.
            points.sort_by(|a, b| a[0].total_cmp(&b[0]));
            (0..points.len()).map(|index| exclusive(&points[index], &points[index + 1..])).sum()
        }
    }
}

/// Method.md's: by the first objective, descending; each point adds what rises above the ones before.
fn sweep(mut points: Vec<Vec<f64>>) -> f64 {
    points.sort_by(|a, b| b[0].total_cmp(&a[0]));
    let (mut area, mut height) = (0.0, 0.0);
    for point in points {
        if point[1] > height {
            area += point[0] * (point[1] - height);
            height = point[1];
        }
    }
    area
}

/// What a point dominates and the others do not: its box, less what the others dominate inside of it.
fn exclusive(point: &[f64], others: &[Vec<f64>]) -> f64 {
    let inside = |other: &Vec<f64>| other.iter().zip(point).map(|(a, b)| a.min(*b)).collect();
    point.iter().product::<f64>() - volume(others.iter().map(inside).collect(), point.len())
}

/// Without points that another one reaches in every objective; of equal points the first stays.
fn undominated(points: Vec<Vec<f64>>) -> Vec<Vec<f64>> {
    let reaches = |a: &Vec<f64>, b: &Vec<f64>| a.iter().zip(b).all(|(x, y)| x >= y);
    let mut kept: Vec<Vec<f64>> = Vec::new();
    for point in points {
        if !kept.iter().any(|other| reaches(other, &point)) {
            kept.retain(|other| !reaches(&point, other));
            kept.push(point);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use uniarm_decode::noise::philox4x32_10;

    use super::*;

    /// Small whole numbers from a counter: ties and dominated points are frequent.
    fn whole_points(count: u32, objectives: u32, seed: u32, below: u32) -> Vec<Vec<f64>> {
        let value = |point, objective| philox4x32_10([point, objective, 0, 0], [seed, 7])[0] % below;
        (0..count).map(|p| (0..objectives).map(|o| f64::from(value(p, o))).collect()).collect()
    }

    /// The obvious way: unit cells below a point, counted.
    fn cells(points: &[Vec<f64>], objectives: u32, below: u32) -> f64 {
        let cell = |index: u32| (0..objectives).map(move |o| f64::from(index / below.pow(o) % below));
        let covered =
            |index: &u32| points.iter().any(|p| p.iter().zip(cell(*index)).all(|(v, low)| *v > low));
        (0..below.pow(objectives)).filter(covered).count() as f64
    }

    #[test]
    fn published_points_have_the_published_volume() {
        let points = [
            [-0.39, 6.09],
            [0.61, 4.56],
            [0.72, 3.48],
            [1.30, 2.09],
            [1.72, -1.90],
            [3.20, -5.56],
            [4.11, -7.96],
            [4.70, -9.97],
            [4.69, -11.75],
            [5.06, -12.27],
            [4.79, -12.95],
        ];
        let points: Vec<Vec<f64>> = points.iter().map(|point| point.to_vec()).collect();
        let volume = hypervolume(&points, &[-3.490_177, -14.669_678]);
        assert!((volume - 123.89).abs() < 0.01, "{volume}");
    }

    #[test]
    fn volume_is_the_count_of_dominated_cells() {
        for seed in 0..20 {
            for (objectives, below) in [(1, 20), (2, 20), (3, 12), (4, 7), (5, 5)] {
                let points = whole_points(12, objectives, seed, below);
                let volume = hypervolume(&points, &vec![0.0; objectives as usize]);
                assert_eq!(volume, cells(&points, objectives, below), "{points:?}");
            }
        }
    }

    /// A third objective in which all points are equal only stretches the area of the other two.
    #[test]
    fn three_objectives_agree_with_two() {
        for seed in 0..10 {
            let flat = whole_points(15, 2, seed, 1000);
            let thick: Vec<Vec<f64>> = flat.iter().map(|point| vec![point[0], 2.5, point[1]]).collect();
            assert_eq!(hypervolume(&thick, &[-3.0, 0.5, -1.0]), 2.0 * hypervolume(&flat, &[-3.0, -1.0]));
        }
    }

    #[test]
    fn volume_agrees_with_random_shots() {
        const SHOTS: u32 = 100_000;
        let unit = |word: u32| f64::from(word) / f64::from(u32::MAX);
        let four = |counter: [u32; 4]| philox4x32_10(counter, [3, 5]).map(unit);
        let points: Vec<Vec<f64>> = (0..30).map(|p| four([p, 0, 1, 0]).to_vec()).collect();
        let hit = |shot: &u32| {
            let shot = four([*shot, 0, 2, 0]);
            points.iter().any(|point| point.iter().zip(shot).all(|(value, at)| *value > at))
        };
        let share = (0..SHOTS).filter(hit).count() as f64 / f64::from(SHOTS);
        let volume = hypervolume(&points, &[0.0; 4]);
        // Five standard deviations of a share near one half.
        assert!((share - volume).abs() < 0.008, "{share} {volume}");
    }

    #[test]
    fn points_below_the_reference_dominate_nothing() {
        let below = [vec![5.0, -1.0], vec![-1.0, 5.0], vec![0.0, 0.0]];
        assert_eq!(hypervolume(&below, &[0.0, 0.0]), 0.0);
        assert_eq!(hypervolume(&[], &[0.0, 0.0]), 0.0);
    }
}
