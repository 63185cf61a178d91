//! What an evaluation found, as pictures, a page and a file for programs.

pub mod chart;
mod html;

use std::path::Path;

use anyhow::Context as _;

use crate::{
    evaluate::{MethodResult, PointResult, Results},
    whole_file,
};
use chart::{Chart, Point, Series};

/// Writes `report.json`, `report.html`, and each picture as SVG and PNG.
///
/// # Errors
/// Where a picture cannot be drawn or the disk refuses.
pub fn write(results: &Results, out: &Path) -> anyhow::Result<()> {
    let json = serde_json::to_string_pretty(results).context("results are JSON")? + "\n";
    whole_file::write(&out.join("report.json"), json.as_bytes())?;
    let pictures = pictures(results);
    let mut drawn = Vec::new();
    for (name, chart) in &pictures {
        let svg = chart.svg()?;
        whole_file::write(&out.join(format!("{name}.svg")), svg.as_bytes())?;
        chart.write_png(&out.join(format!("{name}.png")))?;
        drawn.push((chart.title.as_str(), svg));
    }
    whole_file::write(&out.join("report.html"), html::page(results, &drawn).as_bytes())
}

/// Pictures by file name: the front, then for each objective how it follows its weight.
fn pictures(results: &Results) -> Vec<(String, Chart)> {
    let mut pictures = vec![("front".to_owned(), front(results))];
    for (index, objective) in results.config.objectives.iter().enumerate() {
        // A file's name holds no slash.
        let name = objective.name.replace(|c: char| !c.is_alphanumeric(), "_");
        pictures.push((format!("control-{name}"), control(results, index)));
    }
    pictures
}

/// The first two objectives against each other. More of them have no picture; their numbers stand in the tables.
fn front(results: &Results) -> Chart {
    let objectives = &results.config.objectives;
    let point = |own: &PointResult| Point {
        at: (own.scores[0].value, own.scores[1].value),
        across: Some((own.scores[0].low, own.scores[0].high)),
        up: Some((own.scores[1].low, own.scores[1].high)),
        ..Point::default()
    };
    Chart {
        title: format!("Front: {} and {}", objectives[0].name, objectives[1].name),
        across: format!("{}: mean score, higher is better", objectives[0].name),
        up: format!("{}: mean score", objectives[1].name),
        series: series(results, |method| method.points.iter().map(point).collect()),
    }
}

/// An objective's score over its weight; methods that do not depend on it are level lines.
fn control(results: &Results, objective: usize) -> Chart {
    let name = &results.config.objectives[objective].name;
    let points = |method: &MethodResult| {
        let point = |weight: f32, own: &PointResult| {
            let score = own.scores[objective];
            let at = (f64::from(weight), score.value);
            Point { at, up: Some((score.low, score.high)), ..Point::default() }
        };
        let mut points: Vec<Point> = match method.has_front() {
            true => method.points.iter().map(|own| point(own.preference[objective], own)).collect(),
            false => [0.0, 1.0].map(|weight| point(weight, &method.points[0])).to_vec(),
        };
        points.sort_by(|one, other| one.at.0.total_cmp(&other.at.0));
        points
    };
    Chart {
        title: format!("Control: {name} follows its weight"),
        across: format!("weight of {name} in the preference"),
        up: format!("{name}: mean score"),
        series: series(results, points),
    }
}

fn series(results: &Results, points: impl Fn(&MethodResult) -> Vec<Point>) -> Vec<Series> {
    let series = |(colour, method): (usize, &MethodResult)| Series {
        name: method.name.clone(),
        points: points(method),
        colour,
    };
    results.methods.iter().enumerate().map(series).collect()
}
