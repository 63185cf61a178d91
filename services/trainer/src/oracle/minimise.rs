//! L-BFGS for a smooth convex function (Nocedal and Wright, *Numerical Optimization*, algorithms 7.4 and 3.1).

/// Past steps that shape the next one; the usual choice is 5 to 20.
const MEMORY: usize = 10;
const ITERATIONS_MAX: usize = 200;
/// Ends where the largest slope is this small: far below what a weight in f32 can show.
const SLOPE_MIN: f64 = 1e-5;
/// A step has to gain this share of what the slope promises.
const GAIN_MIN: f64 = 1e-4;
/// Halvings of a step before rounding is all that is left.
const HALVINGS_MAX: usize = 40;

/// A step, the change of the slope over it, and 1 / their product.
struct Past {
    step: Vec<f64>,
    change: Vec<f64>,
    inverse: f64,
}

/// Where the function is least, searched from zero. `function` gives the value and fills in the slope.
pub(super) fn minimise(size: usize, function: impl Fn(&[f64], &mut [f64]) -> f64) -> Vec<f64> {
    let mut place = vec![0.0; size];
    let mut slope = vec![0.0; size];
    let mut value = function(&place, &mut slope);
    let mut past: Vec<Past> = Vec::new();
    for _ in 0..ITERATIONS_MAX {
        if slope.iter().all(|s| s.abs() < SLOPE_MIN) {
            break;
        }
        let direction = direction(&slope, &past);
        let promise = dot(&direction, &slope);
        // Nothing is known of the curvature before the first step: it has length one.
        let mut length = if past.is_empty() { 1.0 / dot(&slope, &slope).sqrt() } else { 1.0 };
        let mut found = None;
        for _ in 0..HALVINGS_MAX {
            let next: Vec<f64> = place.iter().zip(&direction).map(|(x, d)| x + length * d).collect();
            let mut next_slope = vec![0.0; size];
            let next_value = function(&next, &mut next_slope);
            if next_value <= value + GAIN_MIN * length * promise {
                found = Some((next, next_slope, next_value));
                break;
            }
            length *= 0.5;
        }
        let Some((next, next_slope, next_value)) = found else { break };
        let step = difference(&next, &place);
        let change = difference(&next_slope, &slope);
        let product = dot(&step, &change);
        if product > 0.0 {
            past.push(Past { step, change, inverse: 1.0 / product });
            if past.len() > MEMORY {
                past.remove(0);
            }
        }
        (place, slope, value) = (next, next_slope, next_value);
    }
    place
}

/// Downhill, as the past steps bend it.
fn direction(slope: &[f64], past: &[Past]) -> Vec<f64> {
    let mut direction: Vec<f64> = slope.iter().map(|s| -s).collect();
    let mut shares = Vec::with_capacity(past.len());
    for past in past.iter().rev() {
        let share = past.inverse * dot(&past.step, &direction);
        direction.iter_mut().zip(&past.change).for_each(|(d, c)| *d -= share * c);
        shares.push(share);
    }
    if let Some(last) = past.last() {
        let scale = 1.0 / (last.inverse * dot(&last.change, &last.change));
        direction.iter_mut().for_each(|d| *d *= scale);
    }
    for (past, share) in past.iter().zip(shares.iter().rev()) {
        let correction = share - past.inverse * dot(&past.change, &direction);
        direction.iter_mut().zip(&past.step).for_each(|(d, s)| *d += correction * s);
    }
    direction
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn difference(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(x, y)| x - y).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bottom_of_a_long_narrow_valley_is_found() {
        // Σ i²(x_i − i)² / 2
        let valley = |x: &[f64], slope: &mut [f64]| {
            let mut value = 0.0;
            for i in 0..x.len() {
                let (target, steepness) = (i as f64, (1 + i * i) as f64);
                slope[i] = steepness * (x[i] - target);
                value += 0.5 * slope[i] * (x[i] - target);
            }
            value
        };
        let found = minimise(30, valley);
        for (i, x) in found.iter().enumerate() {
            assert!((x - i as f64).abs() < 1e-4, "x_{i} = {x}");
        }
    }
}
