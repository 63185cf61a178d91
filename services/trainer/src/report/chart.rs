//! Charts of a few lines: as SVG text, and as PNG with the font that is compiled in.

use std::{path::Path, sync::OnceLock};

use anyhow::{Context as _, anyhow};
use plotters::{
    coord::Shift,
    data::float::FloatPrettyPrinter,
    element::{Circle, PathElement, Text},
    prelude::*,
    style::{FontStyle, register_font},
};

use crate::whole_file;

/// A subset of DejaVu Sans (font/LICENCE): machines without any font draw the same picture.
const FONT: &[u8] = include_bytes!("font/DejaVuSans-subset.ttf");
const FONT_NAME: &str = "sans-serif";

/// Tol's bright scheme, then of his vibrant and dark ones: told apart by most eyes, on light and on dark ground.
const COLOURS: [RGBColor; 12] = [
    RGBColor(0x44, 0x77, 0xaa),
    RGBColor(0xee, 0x66, 0x77),
    RGBColor(0x22, 0x88, 0x33),
    RGBColor(0xcc, 0xa5, 0x22),
    RGBColor(0x33, 0xa8, 0xd0),
    RGBColor(0xaa, 0x33, 0x77),
    RGBColor(0x88, 0x88, 0x88),
    RGBColor(0xee, 0x77, 0x33),
    RGBColor(0x00, 0x99, 0x88),
    RGBColor(0x99, 0x55, 0xcc),
    RGBColor(0x77, 0x66, 0x33),
    RGBColor(0x22, 0x22, 0x66),
];

/// Room around the values, as a share of their range.
const MARGIN: f64 = 0.06;

/// Size of a picture in pixels.
const SIZE: (u32, u32) = (860, 500);

/// Pixels of the legend: names of some twenty letters.
const LEGEND_WIDTH: u32 = 185;

/// A picture of a few series over one pair of axes.
#[derive(Debug, Clone, Default)]
pub struct Chart {
    pub title: String,
    pub across: String,
    pub up: String,
    pub series: Vec<Series>,
}

#[derive(Debug, Clone, Default)]
pub struct Series {
    pub name: String,
    /// Joined by a line in this order, unless they are `scattered`.
    pub points: Vec<Point>,
    pub scattered: bool,
    /// Place in the palette, so that a method has one colour in every picture.
    pub colour: usize,
}

#[derive(Debug, Clone, Default)]
pub struct Point {
    pub at: (f64, f64),
    /// Intervals, lowest and highest, drawn as thin bars.
    pub across: Option<(f64, f64)>,
    pub up: Option<(f64, f64)>,
    pub label: String,
}

// === impl Chart ===

impl Chart {
    /// # Errors
    /// Where a value is not finite.
    pub fn svg(&self) -> anyhow::Result<String> {
        let mut text = String::new();
        let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        self.draw(&area)?;
        drop(area);
        Ok(text)
    }

    /// # Errors
    /// Where a value is not finite, or the file cannot be written.
    pub fn write_png(&self, path: &Path) -> anyhow::Result<()> {
        // The library draws into files alone, and none of a chart's name may be half a picture.
        let folder = tempfile::tempdir().context("a folder to draw in")?;
        let drawn = folder.path().join("chart.png");
        let area = BitMapBackend::new(&drawn, SIZE).into_drawing_area();
        self.draw(&area)?;
        area.present().context("cannot draw a PNG")?;
        drop(area);
        whole_file::write(path, &std::fs::read(&drawn).context("the PNG that was drawn")?)
    }

    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> anyhow::Result<()>
    where
        B::ErrorType: 'static,
    {
        font()?;
        let drawn = || -> anyhow::Result<()> {
            area.fill(&WHITE)?;
            let points = || self.series.iter().flat_map(|series| &series.points);
            let across = range(points().map(|point| (point.at.0, point.across)))?;
            let up = range(points().map(|point| (point.at.1, point.up)))?;
            // Beside the axes a legend hides no point.
            let (left, right) = area.split_horizontally(SIZE.0 - LEGEND_WIDTH);
            self.draw_legend(&right)?;
            let mut chart = ChartBuilder::on(&left)
                .caption(&self.title, (FONT_NAME, 19))
                .margin(12)
                .x_label_area_size(44)
                .y_label_area_size(64)
                .build_cartesian_2d(across, up)?;
            chart
                .configure_mesh()
                .x_desc(&self.across)
                .y_desc(&self.up)
                .label_style((FONT_NAME, 14))
                .x_label_formatter(&tick)
                .y_label_formatter(&tick)
                .axis_desc_style((FONT_NAME, 15))
                .bold_line_style(BLACK.mix(0.15))
                .light_line_style(TRANSPARENT)
                .draw()?;
            for series in &self.series {
                let colour = COLOURS[series.colour % COLOURS.len()];
                for bar in series.points.iter().flat_map(Point::bars) {
                    chart.draw_series([PathElement::new(bar.to_vec(), colour.mix(0.45))])?;
                }
                if !series.scattered {
                    let line = series.points.iter().map(|point| point.at);
                    chart.draw_series(LineSeries::new(line, colour.stroke_width(2)))?;
                }
                if series.has_dots() {
                    chart.draw_series(
                        series.points.iter().map(|point| Circle::new(point.at, 3, colour.filled())),
                    )?;
                }
                let labelled = series.points.iter().filter(|point| !point.label.is_empty());
                chart.draw_series(
                    labelled.map(|point| Text::new(point.label.clone(), point.at, (FONT_NAME, 12))),
                )?;
            }
            Ok(())
        };
        drawn().with_context(|| format!("cannot draw the chart {:?}", self.title))
    }

    fn draw_legend<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> anyhow::Result<()>
    where
        B::ErrorType: 'static,
    {
        for (line, series) in (0..).zip(&self.series) {
            let colour = COLOURS[series.colour % COLOURS.len()];
            let y = 48 + 22 * line;
            area.draw(&PathElement::new([(4, y), (22, y)], colour.stroke_width(3)))?;
            area.draw(&Text::new(series.name.clone(), (28, y - 7), (FONT_NAME, 13)))?;
        }
        Ok(())
    }
}

// === impl Series ===

impl Series {
    /// A curve of very many points is a line.
    fn has_dots(&self) -> bool {
        const DOTS_MAX: usize = 40;
        self.scattered || self.points.len() <= DOTS_MAX
    }
}

// === impl Point ===

impl Point {
    fn bars(&self) -> impl Iterator<Item = [(f64, f64); 2]> {
        let (x, y) = self.at;
        let across = self.across.map(|(low, high)| [(low, y), (high, y)]);
        let up = self.up.map(|(low, high)| [(x, low), (x, high)]);
        across.into_iter().chain(up)
    }
}

/// As the library writes it, without the sign of what is nothing but rounding.
fn tick(value: &f64) -> String {
    const DECIMALS: i32 = 5;
    let value = if value.abs() < 10_f64.powi(-DECIMALS) { 0.0 } else { *value };
    FloatPrettyPrinter { allow_scientific: false, min_decimal: 1, max_decimal: DECIMALS }.print(value)
}

fn font() -> anyhow::Result<()> {
    static REGISTERED: OnceLock<bool> = OnceLock::new();
    let registered = REGISTERED.get_or_init(|| register_font(FONT_NAME, FontStyle::Normal, FONT).is_ok());
    if *registered { Ok(()) } else { Err(anyhow!("the font that is compiled in cannot be read")) }
}

/// Lowest to highest value with some room; a single value stands in the middle.
fn range(values: impl Iterator<Item = (f64, Option<(f64, f64)>)>) -> anyhow::Result<std::ops::Range<f64>> {
    let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
    for (value, interval) in values {
        let (from, to) = interval.unwrap_or((value, value));
        anyhow::ensure!(value.is_finite() && from.is_finite() && to.is_finite(), "a value is not finite");
        (low, high) = (low.min(value).min(from), high.max(value).max(to));
    }
    anyhow::ensure!(low <= high, "there is nothing to draw");
    let room = match high - low {
        0.0 => 0.5_f64.max(high.abs() * MARGIN),
        width => width * MARGIN,
    };
    Ok(low - room..high + room)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

    use super::*;

    fn chart(values: &[f64]) -> Chart {
        let point = |(index, value): (usize, &f64)| Point {
            at: (index as f64, *value),
            up: Some((value - 0.5, value + 0.5)),
            ..Point::default()
        };
        let points = values.iter().enumerate().map(point).collect();
        let series = vec![Series { name: "a < b".into(), points, ..Series::default() }];
        Chart { title: "Title".into(), across: "x".into(), up: "y".into(), series }
    }

    #[test]
    fn a_chart_is_drawn_the_same_as_svg_and_as_png_without_fonts_of_the_machine() {
        let chart = chart(&[1.0, 3.0, 2.0]);
        let svg = chart.svg().unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("Title") && svg.contains("a &lt; b"), "{svg}");
        assert_eq!(svg, chart.svg().unwrap());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("chart.png");
        chart.write_png(&path).unwrap();
        assert!(std::fs::read(&path).unwrap().starts_with(b"\x89PNG"));
    }

    #[test]
    fn nothing_has_no_sign() {
        assert_eq!([-1e-17, 0.0, -0.05, 1.5].map(|value| tick(&value)), ["0.0", "0.0", "-0.05", "1.5"]);
    }

    #[test]
    fn a_chart_of_one_point_has_room_and_one_without_numbers_says_so() {
        assert!(chart(&[2.0]).svg().is_ok());
        assert!(format!("{:#}", chart(&[f64::NAN]).svg().unwrap_err()).contains("not finite"));
        assert!(format!("{:#}", chart(&[]).svg().unwrap_err()).contains("nothing to draw"));
    }
}
