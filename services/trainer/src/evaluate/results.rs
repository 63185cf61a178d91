//! What the scores mean: points, fronts, volumes, and who dominates whom.

use serde::Serialize;

use super::{
    comparison::{Domination, Lead, dominations, leads},
    config::EvalConfig,
    plan::Plan,
    repetition,
};
use crate::{
    cluster_job::Identities,
    metrics::{self, Bootstrap, Interval},
};

/// Share of the resamples inside an interval.
const COVERED: f64 = 0.95;

/// Of the resamples: the same draws for every method, so that their difference is a paired one.
const BOOTSTRAP_SEED: u64 = 1;

/// Everything that a report says; the file `report.json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Results {
    pub config: EvalConfig,
    pub models: Identities,
    pub prompts: usize,
    pub answers: usize,
    pub tokens: u64,
    pub grid: Vec<Vec<f32>>,
    pub methods: Vec<MethodResult>,
    pub domination: Vec<Domination>,
    pub leads: Vec<Lead>,
    pub examples: Vec<Example>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MethodResult {
    pub name: String,
    /// Answers to each prompt at each point.
    pub answers: usize,
    /// One for each point of the grid; a single one for a method that does not depend on it.
    pub points: Vec<PointResult>,
    pub hypervolume: Interval,
    pub hypervolume_normalised: Interval,
    pub mean_inner_product: Interval,
    pub mean_inner_product_normalised: Interval,
    /// With two objectives: steps along the grid that move an objective's mean the way its weight goes.
    pub right_steps: Vec<usize>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PointResult {
    /// Empty where the method does not depend on it.
    pub preference: Vec<f32>,
    /// Mean score for each objective: q(p).
    pub scores: Vec<Interval>,
    pub tokens: f64,
    /// Share of answers that the model ended itself.
    pub finished: f64,
    pub distinct_2: f64,
    pub repetition: f64,
}

/// Answers of one prompt, side by side.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Example {
    pub prompt: String,
    pub method: String,
    pub answers: Vec<ExampleAnswer>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExampleAnswer {
    pub method: String,
    pub preference: Vec<f32>,
    pub text: String,
    pub tokens: u32,
}

/// Scores of a method: `[point][prompt][objective]`, means over seeds and turns.
pub(super) type Values = Vec<Vec<Vec<f64>>>;

/// `scores` of each cell: `[turn][objective]`.
pub fn measure(plan: &Plan<'_>, scores: &[Vec<Vec<f64>>], identities: &Identities) -> Results {
    let values: Vec<Values> =
        (0..plan.config.methods.len()).map(|method| values(plan, scores, method)).collect();
    let methods: Vec<MethodResult> =
        values.iter().enumerate().map(|(method, values)| MethodResult::of(plan, values, method)).collect();
    let answers = plan.cells.iter().map(|cell| cell.answers.len()).sum();
    Results {
        config: plan.config.clone(),
        models: identities.clone(),
        prompts: plan.prompts.len(),
        answers,
        tokens: plan.tokens(),
        grid: plan.grid.to_vec(),
        domination: dominations(plan, &methods, &values),
        leads: leads(plan, &methods, &values),
        examples: examples(plan),
        methods,
    }
}

// === impl MethodResult ===

impl MethodResult {
    fn of(plan: &Plan<'_>, values: &Values, method: usize) -> Self {
        // All numbers of one resample at once: first the points, then what is computed from them.
        let numbers = bootstrap(plan).intervals(plan.prompts.len(), |drawn| {
            let points = means(values, drawn);
            let whole = whole_front(plan, &points);
            points.into_iter().flatten().chain(whole).collect()
        });
        let (points, whole) = numbers.split_at(numbers.len() - WHOLE);
        let points: Vec<Vec<Interval>> =
            points.chunks(plan.config.objectives.len()).map(<[Interval]>::to_vec).collect();
        Self {
            name: plan.config.methods[method].name.clone(),
            answers: plan.config.methods[method].seeds(plan.config),
            hypervolume: whole[0],
            hypervolume_normalised: whole[1],
            mean_inner_product: whole[2],
            mean_inner_product_normalised: whole[3],
            right_steps: right_steps(plan.grid, &points),
            points: point_results(plan, method, points),
        }
    }

    pub fn has_front(&self) -> bool {
        self.points.len() > 1
    }
}

/// Numbers of a whole front.
const WHOLE: usize = 4;

/// The same draws for every method.
pub(super) fn bootstrap(plan: &Plan<'_>) -> Bootstrap {
    Bootstrap { resamples: plan.config.resamples, level: COVERED, seed: BOOTSTRAP_SEED }
}

/// Hypervolume and mean inner product, each raw and on the fixed scale from reference to ideal.
pub(super) fn whole_front(plan: &Plan<'_>, points: &[Vec<f64>]) -> [f64; WHOLE] {
    let objectives = &plan.config.objectives;
    let reference: Vec<f64> = objectives.iter().map(|objective| objective.reference).collect();
    let widths: Vec<f64> = objectives.iter().map(|objective| objective.ideal - objective.reference).collect();
    let scaled = |point: &Vec<f64>| -> Vec<f64> {
        (0..point.len()).map(|i| (point[i] - reference[i]) / widths[i]).collect()
    };
    let inner = |points: &[Vec<f64>]| match points {
        // The same point for every preference.
        [only] => metrics::mean_inner_product(plan.grid, &vec![only.clone(); plan.grid.len()]),
        front => metrics::mean_inner_product(plan.grid, front),
    };
    let volume = metrics::hypervolume(points, &reference);
    let normalised: Vec<Vec<f64>> = points.iter().map(scaled).collect();
    [volume, volume / widths.iter().product::<f64>(), inner(points), inner(&normalised)]
}

fn values(plan: &Plan<'_>, scores: &[Vec<Vec<f64>>], method: usize) -> Values {
    let objectives = plan.config.objectives.len();
    let mut values = Vec::new();
    for cells in plan.points(method).into_values() {
        let mut sums = vec![vec![0.0; objectives]; plan.prompts.len()];
        let mut counts = vec![0.0_f64; plan.prompts.len()];
        for cell in cells {
            let prompt = plan.cells[cell].prompt;
            for turn in &scores[cell] {
                sums[prompt].iter_mut().zip(turn).for_each(|(sum, score)| *sum += score);
                counts[prompt] += 1.0;
            }
        }
        for (sums, count) in sums.iter_mut().zip(counts) {
            sums.iter_mut().for_each(|sum| *sum /= count);
        }
        values.push(sums);
    }
    values
}

/// q(p) over a sample of the prompts.
pub(super) fn means(values: &Values, sample: &[usize]) -> Vec<Vec<f64>> {
    let mean = |prompts: &Vec<Vec<f64>>| {
        let mut sums = vec![0.0; prompts[0].len()];
        for prompt in sample {
            sums.iter_mut().zip(&prompts[*prompt]).for_each(|(sum, value)| *sum += value);
        }
        sums.into_iter().map(|sum| sum / sample.len() as f64).collect()
    };
    values.iter().map(mean).collect()
}

fn point_results(plan: &Plan<'_>, method: usize, scores: Vec<Vec<Interval>>) -> Vec<PointResult> {
    let result = |((point, cells), scores): ((Option<usize>, Vec<usize>), Vec<Interval>)| {
        let answers = || cells.iter().flat_map(|cell| &plan.cells[*cell].answers);
        let count = answers().count() as f64;
        PointResult {
            preference: point.map_or_else(Vec::new, |point| plan.grid[point].clone()),
            scores,
            tokens: answers().map(|answer| f64::from(answer.tokens)).sum::<f64>() / count,
            finished: answers().filter(|answer| answer.is_finished()).count() as f64 / count,
            distinct_2: repetition::distinct_2(answers().map(|answer| answer.text.as_str())),
            repetition: answers().map(|answer| repetition::repetition(&answer.text)).sum::<f64>() / count,
        }
    };
    plan.points(method).into_iter().zip(scores).map(result).collect()
}

/// Only a grid of two objectives has an order to walk along.
fn right_steps(grid: &[Vec<f32>], q: &[Vec<Interval>]) -> Vec<usize> {
    if q.len() < 2 || grid[0].len() != 2 {
        return Vec::new();
    }
    let right = |objective: usize| {
        let steps = (1..q.len()).filter(|step| {
            let weight = f64::from(grid[*step][objective] - grid[step - 1][objective]);
            (q[*step][objective].value - q[step - 1][objective].value) * weight > 0.0
        });
        steps.count()
    };
    vec![right(0), right(1)]
}

/// The first method with a front, at its corners and its centre, beside the base model.
fn examples(plan: &Plan<'_>) -> Vec<Example> {
    let Some(method) = plan.config.methods.iter().position(super::MethodConfig::has_front) else {
        return Vec::new();
    };
    let example = |prompt: usize| {
        let own = plan.cells.iter().filter(|cell| cell.prompt == prompt && cell.seed == 0);
        let shown = own.filter(|cell| cell.method == method || cell.point.is_none());
        let answers = shown.filter_map(|cell| {
            let answer = cell.answers.first()?;
            // Every second point of eleven fits a page.
            let skipped = cell.point.is_some_and(|point| plan.grid.len() > 6 && point % 2 == 1);
            (!skipped).then(|| ExampleAnswer {
                method: plan.config.methods[cell.method].name.clone(),
                preference: plan.preference(cell).to_vec(),
                text: answer.text.clone(),
                tokens: answer.tokens,
            })
        });
        Example {
            prompt: plan.prompts[prompt].messages.last().map_or(String::new(), |m| m.content.clone()),
            method: plan.config.methods[method].name.clone(),
            answers: answers.collect(),
        }
    };
    (0..plan.prompts.len().min(plan.config.examples)).map(example).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_step_is_no_step_in_the_right_direction() {
        let point =
            |scores: [f64; 2]| scores.map(|value| Interval { value, low: value, high: value }).to_vec();
        let front = [[1.0, 4.0], [2.0, 4.0], [1.5, 3.0], [1.8, 2.0]].map(point);
        let grid: Vec<Vec<f32>> = [0.0, 0.25, 0.5, 1.0].map(|weight| vec![weight, 1.0 - weight]).to_vec();
        assert_eq!(right_steps(&grid, &front), [2, 2]);
        assert!(right_steps(&grid, &front[..1]).is_empty(), "one point is no front");
    }
}
