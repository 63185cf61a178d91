//! /debug/steps: where the time of the last steps went, as a page without a script, or as JSON.

use std::fmt::Write as _;

use axum::{
    extract::{RawQuery, State},
    http::{HeaderMap, StatusCode, header},
    response::{Html, IntoResponse, Response},
};
use serde::Serialize;

use super::Pages;
use crate::steps::{STEPS_KEPT, Step, Steps};

/// Steps that are shown where nobody says: as many as fit beside each other.
const LAST: usize = 64;

/// Seconds between two looks of a browser, at most.
const REFRESH_MAX: u32 = 3600;

/// Pixels of the strip: its height, and the width of a step.
const STRIP_HEIGHT: f64 = 160.0;
const BAR_WIDTH: usize = 10;

/// The axis ends at so many times the median step: one that waited long is cut, or it would flatten all others.
const CUT: f64 = 4.0;

/// Colours of the parts of a step, in the order of `Step::parts`; also told apart by who cannot see red from green.
const COLOURS: [&str; 6] = ["#dddddd", "#cc79a7", "#e69f00", "#56b4e9", "#009e73", "#0072b2"];

const STYLE: &str = "body{font:14px sans-serif;margin:1.5em}table{border-collapse:collapse}\
td,th{padding:.1em .6em;text-align:right;border-bottom:1px solid #ddd}i{display:inline-block;width:1em;height:1em;margin:0 .3em 0 1em}";

/// Columns of the table, after the number and the age of a step: heading, and what stands below it.
const COLUMNS: [Column; 19] = [
    ("prefill tokens", |step| step.prefill_tokens),
    ("decode rows", |step| step.decode_rows),
    ("draft rows", |step| step.draft_rows),
    ("running", |step| step.running),
    ("waiting", |step| step.waiting),
    ("wait µs", |step| step.wait_us),
    ("choose µs", |step| step.choose_us),
    ("commit µs", |step| step.commit_us),
    ("exchange µs", |step| step.exchange_us),
    ("plan µs", |step| step.plan_us),
    ("forward µs", |step| step.forward_us),
    ("all µs", Step::total_us),
    ("drafts made", |step| step.drafts_made),
    ("compared", |step| step.drafts_compared),
    ("accepted", |step| step.drafts_accepted),
    ("tokens", |step| step.tokens_chosen),
    ("answered", |step| step.rows_answered),
    ("blocks", |step| step.blocks_used),
    ("of", |step| step.blocks),
];

type Column = (&'static str, fn(&Step) -> u64);

/// What the query asks for.
#[derive(Debug, PartialEq, Eq)]
struct Asked {
    last: usize,
    json: bool,
    refresh: Option<u32>,
}

#[derive(Serialize)]
struct Answer {
    engines: Vec<Engine>,
}

#[derive(Serialize)]
struct Engine {
    engine: &'static str,
    /// Oldest first.
    steps: Vec<Shown>,
}

#[derive(Serialize)]
struct Shown {
    /// Milliseconds.
    age_ms: f64,
    #[serde(flatten)]
    step: Step,
}

pub(super) async fn page(
    State(pages): State<Pages>,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Response {
    let wants_json = headers
        .get(header::ACCEPT)
        .and_then(|accept| accept.to_str().ok())
        .is_some_and(|accept| accept.contains("application/json"));
    let asked = match Asked::parse(query.as_deref().unwrap_or_default(), wants_json) {
        Ok(asked) => asked,
        Err(reason) => return (StatusCode::BAD_REQUEST, format!("{reason}\n")).into_response(),
    };
    let engines = pages.metrics.engines().iter().map(|steps| Engine::last(steps, asked.last)).collect();
    let answer = Answer { engines };
    if asked.json {
        let text = serde_json::to_string(&answer).expect("numbers and names are JSON");
        return ([(header::CONTENT_TYPE, "application/json")], text).into_response();
    }
    let policy = (header::CONTENT_SECURITY_POLICY, "default-src 'none'; style-src 'unsafe-inline'");
    ([policy], Html(answer.page(&asked))).into_response()
}

// === impl Asked ===

impl Asked {
    fn parse(query: &str, wants_json: bool) -> Result<Self, String> {
        let mut asked = Self { last: LAST, json: wants_json, refresh: None };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let refused = |wants: String| Err(format!("{name}={value}: wants {wants}"));
            match name {
                "last" => match value.parse() {
                    Ok(last @ 1..=STEPS_KEPT) => asked.last = last,
                    _ => return refused(format!("a number of steps from 1 to {STEPS_KEPT}")),
                },
                "refresh" => match value.parse() {
                    Ok(seconds @ 1..=REFRESH_MAX) => asked.refresh = Some(seconds),
                    _ => return refused(format!("seconds from 1 to {REFRESH_MAX}")),
                },
                "format" => match value {
                    "json" => asked.json = true,
                    "html" => asked.json = false,
                    _ => return refused("json or html".to_owned()),
                },
                _ => return Err(format!("{name}: is not known; there are last, format and refresh")),
            }
        }
        Ok(asked)
    }
}

// === impl Engine ===

impl Engine {
    fn last(steps: &Steps, most: usize) -> Self {
        let shown = |step: Step| Shown { age_ms: steps.age(&step).as_micros() as f64 / 1e3, step };
        Self { engine: steps.engine(), steps: steps.last(most).into_iter().map(shown).collect() }
    }

    /// Microseconds at the top of the strip.
    fn axis(&self) -> f64 {
        let mut totals: Vec<u64> = self.steps.iter().map(|shown| shown.step.total_us()).collect();
        totals.sort_unstable();
        let (median, most) = (totals[totals.len() / 2] as f64, totals[totals.len() - 1] as f64);
        most.min(CUT * median).max(1.0)
    }

    /// A bar for each step, its parts from the bottom up.
    fn strip(&self) -> Result<String, std::fmt::Error> {
        let (axis, width) = (self.axis(), self.steps.len() * BAR_WIDTH);
        let mut svg = format!(
            "<p>0 to {:.1} ms{}</p><svg width=\"{width}\" height=\"{STRIP_HEIGHT}\" role=\"img\">",
            axis / 1e3,
            if self.steps.iter().any(|shown| shown.step.total_us() as f64 > axis) {
                "; longer ones are cut"
            } else {
                ""
            }
        );
        for (index, Shown { step, .. }) in self.steps.iter().enumerate() {
            write!(svg, "<g><title>step {}: {} µs</title>", step.number, step.total_us())?;
            let mut top = STRIP_HEIGHT;
            // What is computed stands on the ground, what was waited for is what gets cut.
            for ((_, microseconds), colour) in step.parts().into_iter().zip(COLOURS).rev() {
                let height = (microseconds as f64 / axis * STRIP_HEIGHT).min(top);
                if height > 0.0 {
                    top -= height;
                    let (x, width) = (index * BAR_WIDTH, BAR_WIDTH - 1);
                    write!(
                        svg,
                        "<rect x=\"{x}\" y=\"{top:.1}\" width=\"{width}\" height=\"{height:.1}\" fill=\"{colour}\"/>"
                    )?;
                }
            }
            svg.push_str("</g>");
        }
        svg.push_str("</svg>");
        Ok(svg)
    }

    /// A line for each step, latest first.
    fn table(&self) -> Result<String, std::fmt::Error> {
        let mut table = String::from("<table><tr><th>step<th>ms ago");
        for (heading, _) in COLUMNS {
            write!(table, "<th>{heading}")?;
        }
        for Shown { age_ms, step } in self.steps.iter().rev() {
            write!(table, "<tr><td>{}<td>{age_ms:.1}", step.number)?;
            for (_, number) in COLUMNS {
                write!(table, "<td>{}", number(step))?;
            }
        }
        table.push_str("</table>");
        Ok(table)
    }
}

// === impl Answer ===

impl Answer {
    fn page(&self, asked: &Asked) -> String {
        let mut page = String::from("<!doctype html><meta charset=\"utf-8\">");
        if let Some(seconds) = asked.refresh {
            page.push_str(&format!("<meta http-equiv=\"refresh\" content=\"{seconds}\">"));
        }
        page.push_str(&format!("<title>uniarm steps</title><style>{STYLE}</style>"));
        if self.engines.is_empty() {
            page.push_str("<p>No engine has begun in this process.</p>");
        } else {
            page.push_str("<p>A step is what happened from the end of one forward to the end of the next.");
            for ((part, _), colour) in Step::default().parts().into_iter().zip(COLOURS) {
                page.push_str(&format!("<i style=\"background:{colour}\"></i>{part}"));
            }
        }
        for engine in &self.engines {
            page.push_str(&format!("<h2>{}</h2>", engine.engine));
            match engine.steps.is_empty() {
                true => page.push_str("<p>No steps yet.</p>"),
                false => {
                    page.push_str(&engine.strip().expect("writing to a string cannot fail"));
                    page.push_str(&engine.table().expect("writing to a string cannot fail"));
                }
            }
        }
        page
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_query_is_taken_or_refused_by_name() {
        let asked = |last, json, refresh| Ok(Asked { last, json, refresh });
        assert_eq!(Asked::parse("", false), asked(LAST, false, None));
        assert_eq!(Asked::parse("last=512&format=json", false), asked(512, true, None));
        assert_eq!(Asked::parse("refresh=2&format=html", true), asked(LAST, false, Some(2)));
        for (query, said) in [
            ("last=0", "from 1 to 512"),
            ("last=513", "from 1 to 512"),
            ("last=-1", "from 1 to 512"),
            ("refresh=0", "from 1 to 3600"),
            ("format=xml", "json or html"),
            ("first=3", "there are last, format and refresh"),
        ] {
            let reason = Asked::parse(query, false).unwrap_err();
            assert!(reason.contains(said), "{reason:?} should say {said:?}");
        }
    }

    #[test]
    fn a_step_that_waited_long_is_cut_and_flattens_no_other() {
        let steps = Steps::new("base");
        for wait_us in [0, 0, 1_000_000, 0] {
            steps.publish(Instant::now(), Step { wait_us, forward_us: 1000, ..Step::default() });
        }
        let engine = Engine::last(&steps, LAST);
        assert!((engine.axis() - 4000.0).abs() < f64::EPSILON);
        let strip = engine.strip().unwrap();
        assert!(strip.contains("longer ones are cut"), "{strip}");
        // Every forward as high as the others, and the wait up to the top.
        assert_eq!(strip.matches("height=\"40.0\"").count(), 4, "{strip}");
        assert!(strip.contains("y=\"0.0\" width=\"9\" height=\"120.0\""), "{strip}");
    }
}
