//! Curves of a run, from its metrics: the loss, and the accuracies at the corners and the centre.

use std::{collections::BTreeMap, path::Path};

use anyhow::Context as _;
use serde_json::Value;

use crate::report::chart::{Chart, Point, Series};
use crate::whole_file;

/// Points of a curve, at most: more cannot be told apart.
const POINTS_MAX: usize = 150;

/// Writes `curve.svg`, `curve.png`, `accuracy.svg` and `accuracy.png`.
///
/// # Errors
/// Where the file system refuses, or a metric is not what this module reads.
pub fn draw(folder: &Path, metrics: &str) -> anyhow::Result<()> {
    let (mut losses, mut held_out) = (Vec::new(), Vec::new());
    let mut accuracies = BTreeMap::<String, Vec<(f64, f64)>>::new();
    for line in metrics.lines() {
        let line: Value = serde_json::from_str(line).context("metrics.jsonl")?;
        let at = |value: &Value| line["step"].as_f64().zip(value.as_f64());
        if line["event"] == "step" {
            losses.extend(at(&line["loss"]));
            continue;
        }
        held_out.extend(at(&line["loss"]));
        for (name, share) in line["accuracy"].as_object().into_iter().flatten() {
            accuracies.entry(name.clone()).or_default().extend(at(share));
        }
        accuracies.entry("mixed, at the centre".to_owned()).or_default().extend(at(&line["centre_accuracy"]));
    }
    let curves = [("batches, mean".to_owned(), means(&losses)), ("held out".to_owned(), held_out)];
    write(folder, "curve", "loss", "Loss", curves.into_iter())?;
    write(
        folder,
        "accuracy",
        "share of held-out pairs in the right order",
        "Accuracy",
        accuracies.into_iter(),
    )
}

fn write(
    folder: &Path,
    name: &str,
    up: &str,
    title: &str,
    curves: impl Iterator<Item = (String, Vec<(f64, f64)>)>,
) -> anyhow::Result<()> {
    let point = |at: (f64, f64)| Point { at, ..Point::default() };
    let series = |(colour, (name, points)): (usize, (String, Vec<(f64, f64)>))| Series {
        name,
        points: points.into_iter().map(point).collect(),
        colour,
        ..Series::default()
    };
    let series: Vec<Series> =
        curves.filter(|(_, points)| !points.is_empty()).enumerate().map(series).collect();
    if series.is_empty() {
        return Ok(());
    }
    let chart = Chart { title: title.to_owned(), across: "step".to_owned(), up: up.to_owned(), series };
    let svg = chart.svg()?;
    whole_file::write(&folder.join(format!("{name}.svg")), svg.as_bytes())?;
    chart.write_png(&folder.join(format!("{name}.png")))
}

/// Means over neighbours, so that at most [`POINTS_MAX`] are left: single batches are mostly noise.
fn means(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let width = points.len().div_ceil(POINTS_MAX).max(1);
    let mean = |group: &[(f64, f64)]| {
        let count = group.len() as f64;
        let sum = group.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
        (sum.0 / count, sum.1 / count)
    };
    points.chunks(width).map(mean).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

    use super::*;

    #[test]
    fn metrics_become_two_curves() {
        let folder = tempfile::tempdir().unwrap();
        let evaluation = |step: u32, loss: f32| {
            format!(
                r#"{{"event":"evaluation","step":{step},"loss":{loss},"accuracy":{{"short":0.5}},"centre_accuracy":0.6}}"#
            )
        };
        let step = |step: u32| format!(r#"{{"event":"step","step":{step},"loss":0.7}}"#);
        let metrics = [evaluation(0, 0.7), step(1), step(2), evaluation(2, 0.6)].join("\n");
        draw(folder.path(), &metrics).unwrap();
        let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
        assert!(read("curve.svg").contains("held out") && read("accuracy.svg").contains("short"));
        assert!(folder.path().join("curve.png").is_file() && folder.path().join("accuracy.png").is_file());
        draw(folder.path(), "").unwrap();
        assert_eq!(means(&vec![(1.0, 2.0); 400]).len(), 134);
    }
}
