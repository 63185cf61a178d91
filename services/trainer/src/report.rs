//! What an evaluation found, as pictures, a page and a file for programs.

pub mod chart;
mod html;

use std::path::Path;

use anyhow::Context as _;

use crate::{
    evaluate::{MethodConfig, MethodResult, PointResult, Results},
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

/// Pictures by file name: the front, of each two objectives, then for each objective how it follows its weight; and the
/// front of variants, if there are any, so that neither picture is too full to be read.
fn pictures(results: &Results) -> Vec<(String, Chart)> {
    let methods = results.config.methods.iter().enumerate();
    let (variants, main): (Vec<_>, Vec<_>) = methods.partition(|(_, method)| method.variant);
    let indices =
        |methods: &[(usize, &MethodConfig)]| methods.iter().map(|(index, _)| *index).collect::<Vec<_>>();
    let (variants, main) = (indices(&variants), indices(&main));
    let objectives = &results.config.objectives;
    // A file's name holds no slash.
    let name = |index: usize| objectives[index].name.replace(|c: char| !c.is_alphanumeric(), "_");
    let mut pictures = Vec::new();
    for up in 1..objectives.len() {
        for across in 0..up {
            let file = match objectives.len() {
                2 => "front".to_owned(),
                _ => format!("front-{}-{}", name(across), name(up)),
            };
            pictures.push((file.clone(), front(results, &main, across, up)));
            if !variants.is_empty() {
                // Beside what they vary, the first method.
                let shown: Vec<usize> = main.first().copied().into_iter().chain(variants.clone()).collect();
                let mut chart = front(results, &shown, across, up);
                chart.title.push_str(", variants");
                pictures.push((format!("{file}-variants"), chart));
            }
        }
    }
    for index in 0..objectives.len() {
        pictures.push((format!("control-{}", name(index)), control(results, &main, index)));
    }
    pictures
}

/// Two objectives against each other. Of more than two, it is a shadow of the front, whose points have no order.
fn front(results: &Results, shown: &[usize], across: usize, up: usize) -> Chart {
    let objectives = &results.config.objectives;
    let point = |own: &PointResult| Point {
        at: (own.scores[across].value, own.scores[up].value),
        across: Some((own.scores[across].low, own.scores[across].high)),
        up: Some((own.scores[up].low, own.scores[up].high)),
        ..Point::default()
    };
    let mut series = series(results, shown, |method| method.points.iter().map(point).collect());
    series.iter_mut().for_each(|series| series.scattered = objectives.len() > 2);
    Chart {
        title: format!("Front: {} and {}", objectives[across].name, objectives[up].name),
        across: format!("{}: mean score, higher is better", objectives[across].name),
        up: format!("{}: mean score", objectives[up].name),
        series,
    }
}

/// An objective's score over its weight; methods that do not depend on it are level lines.
fn control(results: &Results, shown: &[usize], objective: usize) -> Chart {
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
        series: series(results, shown, points),
    }
}

/// One for each of the methods that are shown, by their indices.
fn series(results: &Results, shown: &[usize], points: impl Fn(&MethodResult) -> Vec<Point>) -> Vec<Series> {
    let series = |(colour, index): (usize, &usize)| Series {
        name: results.methods[*index].name.clone(),
        points: points(&results.methods[*index]),
        colour,
        ..Series::default()
    };
    shown.iter().enumerate().map(series).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

    use super::*;
    use crate::{cluster_job::Identities, metrics::Interval};

    const CONFIG: &str = r#"
        title = "Three"
        prompts = "prompts.jsonl"
        seeds = [1]
        temperature = 1.0
        max_tokens = 8
        [[methods]]
        name = "method"
        guidance = "conditioned"
        reward = "one"
        [[methods]]
        name = "variant"
        guidance = "conditioned"
        reward = "two"
        variant = true
        [[objectives]]
        name = "kind"
        oracle = "vader"
        reference = -1.0
        ideal = 1.0
        [[objectives]]
        name = "to the point"
        oracle = "brevity"
        reference = -7.0
        ideal = -3.0
        [[objectives]]
        name = "easy"
        oracle = "readability"
        reference = 0.0
        ideal = 100.0
    "#;

    /// A method at the corners of the simplex.
    fn results() -> Results {
        let interval = Interval { value: 0.5, low: 0.4, high: 0.6 };
        let grid: Vec<Vec<f32>> = vec![vec![1.0, 0.0, 0.0], vec![0.0, 1.0, 0.0], vec![0.0, 0.0, 1.0]];
        let point = |preference: &Vec<f32>| PointResult {
            preference: preference.clone(),
            scores: preference
                .iter()
                .map(|weight| Interval { value: f64::from(*weight), ..interval })
                .collect(),
            tokens: 8.0,
            finished: 1.0,
            distinct_2: 1.0,
            repetition: 0.0,
        };
        let method = MethodResult {
            name: "method".into(),
            answers: 1,
            points: grid.iter().map(point).collect(),
            hypervolume: interval,
            hypervolume_normalised: interval,
            mean_inner_product: interval,
            mean_inner_product_normalised: interval,
            right_steps: Vec::new(),
        };
        Results {
            config: toml::from_str(CONFIG).unwrap(),
            models: Identities::default(),
            prompts: 1,
            answers: 3,
            tokens: 24,
            grid,
            methods: vec![method.clone(), MethodResult { name: "variant".into(), ..method }],
            domination: Vec::new(),
            leads: Vec::new(),
            examples: Vec::new(),
        }
    }

    #[test]
    fn of_three_objectives_each_two_have_a_picture_and_variants_another() {
        let folder = tempfile::tempdir().unwrap();
        write(&results(), folder.path()).unwrap();
        let mut files: Vec<String> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.ends_with(".png"))
            .collect();
        files.sort_unstable();
        let expected = [
            "control-easy.png",
            "control-kind.png",
            "control-to_the_point.png",
            "front-kind-easy-variants.png",
            "front-kind-easy.png",
            "front-kind-to_the_point-variants.png",
            "front-kind-to_the_point.png",
            "front-to_the_point-easy-variants.png",
            "front-to_the_point-easy.png",
        ];
        assert_eq!(files, expected);
        let page = std::fs::read_to_string(folder.path().join("report.html")).unwrap();
        assert_eq!(page.matches("<h2>Front: ").count(), 6);
    }
}
