//! Preferences that every line is asked under: a grid over the simplex, or a file of them.

use std::path::{Path, PathBuf};

use uniarm_openai::preference;
use uniarm_proto::limits::OBJECTIVES_MAX;

/// Preferences of a job: a line becomes that many requests.
const PREFERENCES_MAX: usize = 10_000;

/// A step such as 0.1 is one tenth, as far as decimal digits can say so.
const STEP_ROUNDING: f64 = 1e-6;

/// Weights by objective.
pub type Preference = Vec<(String, f32)>;

/// What `--preferences` says.
#[derive(Debug, Clone, PartialEq)]
pub enum Preferences {
    /// `grid:0.1`: all weights that are multiples of 1/steps.
    Grid { steps: usize },
    /// A JSON object of weights in each line.
    File(PathBuf),
}

#[derive(Debug, thiserror::Error)]
#[error("{place}: {reason}")]
pub struct PreferencesError {
    place: String,
    reason: String,
}

// === impl Preferences ===

impl std::str::FromStr for Preferences {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some(step) = text.strip_prefix("grid:") else { return Ok(Self::File(text.into())) };
        let step: f64 = step.parse().map_err(|_| format!("{step:?} is no number; grid:0.1 is a grid"))?;
        let steps = (1.0 / step).round();
        let is_whole =
            (1..=PREFERENCES_MAX).contains(&(steps as usize)) && (steps * step - 1.0).abs() < STEP_ROUNDING;
        match step > 0.0 && is_whole {
            true => Ok(Self::Grid { steps: steps as usize }),
            false => Err(format!("a step of {step} does not divide 1; grid:0.1, grid:0.25 and grid:0.5 do")),
        }
    }
}

impl Preferences {
    /// `objectives`: those of the grid.
    ///
    /// # Errors
    /// A grid of too many points, or a file with a line that is no preference.
    pub fn read(&self, objectives: &[String]) -> Result<Vec<Preference>, PreferencesError> {
        let failed = |place: String, reason: String| PreferencesError { place, reason };
        match self {
            Self::File(path) => read_file(path),
            Self::Grid { steps } => {
                let place =
                    || format!("--preferences grid of {} objectives in {steps} steps", objectives.len());
                if objectives.is_empty() {
                    return Err(failed(
                        place(),
                        "no reward model with objectives is served; name one with --reward".into(),
                    ));
                }
                let count = lattice_points(objectives.len(), *steps);
                if objectives.len() > OBJECTIVES_MAX || count.is_none_or(|count| count > PREFERENCES_MAX) {
                    return Err(failed(
                        place(),
                        format!("has more than {PREFERENCES_MAX} points; take a wider step"),
                    ));
                }
                let named = |point: Vec<f32>| objectives.iter().cloned().zip(point).collect();
                Ok(lattice(objectives.len(), *steps).into_iter().map(named).collect())
            }
        }
    }
}

fn read_file(path: &Path) -> Result<Vec<Preference>, PreferencesError> {
    let failed = |place: String, reason: String| PreferencesError { place, reason };
    let text = std::fs::read_to_string(path).map_err(|error| {
        failed(
            path.display().to_string(),
            format!("{error}; --preferences wants a file, or a grid such as grid:0.1"),
        )
    })?;
    let mut preferences = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let place = || format!("{}:{}", path.display(), index + 1);
        let object = serde_json::from_str(line).map_err(|error| {
            failed(place(), format!("wants an object such as {{\"harmless\": 0.7}}: {error}"))
        })?;
        let weights = preference("preference", object).map_err(|refusal| failed(place(), refusal.message))?;
        preferences.push(weights.into_iter().map(|one| (one.objective, one.weight)).collect());
    }
    match preferences.len() {
        0 => Err(failed(path.display().to_string(), "has no preferences".into())),
        1..=PREFERENCES_MAX => Ok(preferences),
        more => Err(failed(
            path.display().to_string(),
            format!("has {more} preferences, the limit is {PREFERENCES_MAX}"),
        )),
    }
}

/// C(steps + k − 1, k − 1), where a machine can count it.
fn lattice_points(objectives: usize, steps: usize) -> Option<usize> {
    (1..objectives).try_fold(1usize, |count, k| Some(count.checked_mul(steps + k)? / k))
}

/// All preferences over `objectives` whose weights are multiples of 1/steps, ascending in the first, then the second,
/// …: for two objectives (0, 1), (1/steps, 1 − 1/steps), …, (1, 0).
///
/// # Panics
/// Without objectives or steps.
pub fn lattice(objectives: usize, steps: usize) -> Vec<Vec<f32>> {
    assert!(objectives > 0 && steps > 0, "a lattice has objectives and steps");
    let mut points = Vec::new();
    compositions(objectives, steps, &mut Vec::new(), &mut points);
    let weight = |count: usize| (count as f64 / steps as f64) as f32;
    points.into_iter().map(|counts| counts.into_iter().map(weight).collect()).collect()
}

fn compositions(parts: usize, sum: usize, begun: &mut Vec<usize>, done: &mut Vec<Vec<usize>>) {
    if parts == 1 {
        done.push(begun.iter().copied().chain([sum]).collect());
        return;
    }
    for first in 0..=sum {
        begun.push(first);
        compositions(parts - 1, sum - first, begun, done);
        begun.pop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lattice_of_two_objectives_is_the_grid_and_of_three_the_simplex() {
        let grid = lattice(2, 10);
        assert_eq!(grid.len(), 11);
        assert_eq!((grid[0].as_slice(), grid[3].as_slice()), ([0.0, 1.0].as_slice(), [0.3, 0.7].as_slice()));
        let simplex = lattice(3, 4);
        assert_eq!(simplex.len(), 15);
        assert!(simplex.iter().all(|p| (p.iter().sum::<f32>() - 1.0).abs() < 1e-6));
        assert!(simplex.windows(2).all(|pair| pair[0] < pair[1]), "ascending, so none twice");
        assert_eq!(lattice(1, 5), [[1.0]]);
        for (objectives, steps) in [(1, 5), (2, 10), (3, 4), (4, 6)] {
            assert_eq!(lattice_points(objectives, steps), Some(lattice(objectives, steps).len()));
        }
    }

    #[test]
    fn a_grid_divides_one_and_anything_else_is_a_file() {
        assert_eq!("grid:0.1".parse(), Ok(Preferences::Grid { steps: 10 }));
        assert_eq!("grid:0.333333333".parse(), Ok(Preferences::Grid { steps: 3 }));
        assert_eq!("sweep.jsonl".parse(), Ok(Preferences::File("sweep.jsonl".into())));
        for wrong in ["grid:0.3", "grid:0", "grid:-0.5", "grid:x", "grid:nan", "grid:2", "grid:1e-9"] {
            assert!(wrong.parse::<Preferences>().is_err(), "{wrong}");
        }
        let many: Vec<String> = (0..20).map(|index| format!("o{index}")).collect();
        assert!(Preferences::Grid { steps: 20 }.read(&many).is_err());
    }
}
