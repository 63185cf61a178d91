//! The curve as an SVG file. Lines, ticks and words are all there is to it: a plotting library would be the largest
//! dependency of this binary for forty lines.

use std::fmt::Write as _;

use uniarm_simulate::{Report, Setup, Targets};

use super::Point;

const WIDTH: f64 = 720.0;
const PANEL: f64 = 170.0;
const LEFT: f64 = 90.0;
const RIGHT: f64 = 20.0;
const ABOVE: f64 = 40.0;
const BELOW: f64 = 50.0;

/// Points of one curve, and how they are read.
pub struct Panel<'a> {
    pub title: &'a str,
    pub points: Vec<(f64, f64)>,
    /// Another curve, behind that one.
    pub behind: Vec<(f64, f64)>,
    /// A value to be met, drawn as a line.
    pub target: Option<f64>,
    pub across: &'a str,
    /// Steps instead of slopes: between two pool sizes there is nothing.
    pub stairs: bool,
    /// Whether each point is marked.
    pub dots: bool,
}

/// Latencies and goodput over load, and the staircase of pool sizes where there was a search.
pub fn svg(setup: &Setup, targets: &Targets, points: &[Point], pairs: &[Report]) -> String {
    let over_load = |title, target, of: &dyn Fn(&Report) -> f64| Panel {
        title,
        points: points.iter().map(|point| (point.rate, of(&point.report))).collect(),
        behind: Vec::new(),
        target: Some(target),
        across: "requests per second",
        stairs: false,
        dots: true,
    };
    let (first, gap) = (targets.first_token.as_secs_f64() * 1e3, targets.inter_token.as_secs_f64() * 1e3);
    let mut panels = vec![
        over_load("goodput, %", targets.goodput * 1e2, &|report| report.goodput * 1e2),
        over_load("first token p99, ms", first, &|report| report.first_token.p99 * 1e3),
        over_load("gap p99, ms", gap, &|report| report.inter_token.p99 * 1e3),
    ];
    if !pairs.is_empty() {
        let pair = |report: &Report| (report.base_workers as f64, report.reward_workers as f64);
        panels.push(Panel {
            title: "reward workers that suffice",
            points: pairs.iter().map(pair).collect(),
            behind: Vec::new(),
            target: None,
            across: "base workers",
            stairs: true,
            dots: true,
        });
    }
    let workers = format!(
        "{} × {}, {} × {}",
        setup.base.workers,
        setup.base.cost.name(),
        setup.reward.workers,
        setup.reward.cost.name()
    );
    page(&panels, &workers)
}

/// Panels one below the other, with a note over the first.
pub fn page(panels: &[Panel<'_>], first_note: &str) -> String {
    let height = panels.len() as f64 * (PANEL + ABOVE + BELOW);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    for (index, panel) in panels.iter().enumerate() {
        let note = if index == 0 { first_note } else { "" };
        panel.draw(index as f64 * (PANEL + ABOVE + BELOW) + ABOVE, note, &mut svg);
    }
    svg + "</svg>\n"
}

// === impl Panel ===

impl Panel<'_> {
    fn draw(&self, top: f64, note: &str, svg: &mut String) {
        let most = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max).max(f64::MIN_POSITIVE);
        let wide = most(&mut self.points.iter().map(|point| point.0));
        // A queue that never ends would flatten everything that can be told apart.
        let high = most(&mut self.points.iter().chain(&self.behind).map(|point| point.1).chain(self.target));
        let high = self.target.map_or(high, |target| high.min(3.0 * target));
        let x = |value: f64| LEFT + (WIDTH - LEFT - RIGHT) * value / (1.05 * wide);
        let y = |value: f64| top + PANEL * (1.0 - value.min(high) / (1.05 * high));
        line(svg, [LEFT, top, LEFT, top + PANEL], "black");
        line(svg, [LEFT, top + PANEL, WIDTH - RIGHT, top + PANEL], "black");
        for tick in ticks(high) {
            text(svg, [LEFT - 8.0, y(tick) + 4.0], "end", &format!("{tick}"));
            line(svg, [LEFT, y(tick), WIDTH - RIGHT, y(tick)], "#dddddd");
        }
        for tick in ticks(wide) {
            text(svg, [x(tick), top + PANEL + 16.0], "middle", &format!("{tick}"));
        }
        text(svg, [LEFT, top - 10.0], "start", self.title);
        text(svg, [WIDTH - RIGHT, top - 10.0], "end", note);
        text(svg, [WIDTH - RIGHT, top + PANEL + 32.0], "end", self.across);
        if let Some(target) = self.target {
            line(svg, [LEFT, y(target), WIDTH - RIGHT, y(target)], "#cc3311");
        }
        let at = |&(across, up): &(f64, f64)| (x(across), y(up));
        self.curve(self.behind.iter().map(at), "#bbbbbb", svg);
        self.curve(self.points.iter().map(at), "#0077bb", svg);
    }

    fn curve(&self, points: impl Iterator<Item = (f64, f64)>, colour: &str, svg: &mut String) {
        let mut path = String::new();
        for (index, (x, y)) in points.enumerate() {
            let _ = match (index, self.stairs) {
                (0, _) => write!(path, "M{x:.1} {y:.1}"),
                (_, true) => write!(path, "H{x:.1}V{y:.1}"),
                (_, false) => write!(path, "L{x:.1} {y:.1}"),
            };
            if self.dots {
                let _ = writeln!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>");
            }
        }
        if path.is_empty() {
            return;
        }
        let _ = writeln!(svg, "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>");
    }
}

fn line(svg: &mut String, [x1, y1, x2, y2]: [f64; 4], colour: &str) {
    let _ = writeln!(
        svg,
        "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\"/>"
    );
}

fn text(svg: &mut String, [x, y]: [f64; 2], anchor: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{words}</text>");
}

/// Round numbers from zero to `most`: three to seven of them.
fn ticks(most: f64) -> Vec<f64> {
    let magnitude = 10f64.powf((most / 4.0).log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * magnitude);
    let step = step.into_iter().find(|step| most / step <= 6.0).unwrap_or(10.0 * magnitude);
    // Products of whole numbers, so that 0.3 is not 0.30000000000000004.
    (0..)
        .map(|count| (f64::from(count) * step * 1e9).round() / 1e9)
        .take_while(|tick| *tick <= most)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_few() {
        assert_eq!(ticks(100.0), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        assert_eq!(ticks(0.7), [0.0, 0.2, 0.4, 0.6]);
        assert_eq!(ticks(1500.0), [0.0, 500.0, 1000.0, 1500.0]);
    }
}
