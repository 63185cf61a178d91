//! Methods against each other, over the same draws of prompts: what is hard or easy about a prompt cancels.

use serde::Serialize;

use super::{
    plan::Plan,
    results::{MethodResult, PointResult, Values, bootstrap, means, whole_front},
};
use crate::metrics::{Bootstrap, Interval};

/// Points of a front that beat a point of a method without one in every objective.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Domination {
    pub front: String,
    pub over: String,
    pub points: usize,
    /// Of these, the ones whose differences over the same prompts have intervals above 0.
    pub paired: usize,
    /// Of these, the ones whose own intervals lie wholly above.
    pub disjoint: usize,
    pub of: usize,
}

/// How far the first front is ahead of another method.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Lead {
    pub front: String,
    pub over: String,
    pub hypervolume: Interval,
    pub mean_inner_product: Interval,
}

/// Every front over every method without one.
pub fn dominations(plan: &Plan<'_>, methods: &[MethodResult], values: &[Values]) -> Vec<Domination> {
    let mut found = Vec::new();
    for (front, own) in methods.iter().zip(values).filter(|(method, _)| method.has_front()) {
        for (single, other) in methods.iter().zip(values).filter(|(method, _)| !method.has_front()) {
            let over = &single.points[0].scores;
            let all = |point: &&PointResult, better: &dyn Fn(&Interval, &Interval) -> bool| {
                point.scores.iter().zip(over).all(|(own, other)| better(own, other))
            };
            let points = front.points.iter().filter(|point| all(point, &|a, b| a.value > b.value));
            let disjoint = front.points.iter().filter(|point| all(point, &|a, b| a.low > b.high));
            found.push(Domination {
                front: front.name.clone(),
                over: single.name.clone(),
                points: points.count(),
                paired: paired(bootstrap(plan), own, other),
                disjoint: disjoint.count(),
                of: front.points.len(),
            });
        }
    }
    found
}

/// Points of a front whose differences to another method's only point are above 0 in every objective.
fn paired(bootstrap: Bootstrap, front: &Values, single: &Values) -> usize {
    let (prompts, objectives) = (single[0].len(), single[0][0].len());
    let differences = bootstrap.intervals(prompts, |drawn| {
        let over = means(single, drawn).swap_remove(0);
        let points = means(front, drawn);
        points.iter().flat_map(|point| point.iter().zip(&over).map(|(own, over)| own - over)).collect()
    });
    differences.chunks(objectives).filter(|point| point.iter().all(|difference| difference.low > 0.0)).count()
}

/// The first method with a front over each of the others.
pub fn leads(plan: &Plan<'_>, methods: &[MethodResult], values: &[Values]) -> Vec<Lead> {
    let Some(first) = methods.iter().position(MethodResult::has_front) else { return Vec::new() };
    let lead = |other: usize| {
        let differences = bootstrap(plan).intervals(plan.prompts.len(), |drawn| {
            let [own, over] = [first, other].map(|method| whole_front(plan, &means(&values[method], drawn)));
            own.iter().zip(&over).map(|(own, over)| own - over).collect()
        });
        Lead {
            front: methods[first].name.clone(),
            over: methods[other].name.clone(),
            hypervolume: differences[0],
            mean_inner_product: differences[2],
        }
    };
    (0..methods.len()).filter(|other| *other != first).map(lead).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_prompt_does_to_both_methods_hides_no_difference() {
        // One objective; prompts differ by far more than methods, whose own intervals overlap.
        let of = |gain: f64| vec![(0..40).map(|prompt| vec![f64::from(prompt) + gain]).collect::<Vec<_>>()];
        let bootstrap = Bootstrap { resamples: 200, level: 0.95, seed: 1 };
        assert_eq!(paired(bootstrap, &of(0.1), &of(0.0)), 1);
        assert_eq!(paired(bootstrap, &of(0.0), &of(0.0)), 0);
        assert_eq!(paired(bootstrap, &of(-0.1), &of(0.0)), 0);
    }
}
