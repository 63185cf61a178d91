//! The report as one page: no script, no request to anywhere, readable on a phone, in the light and in the dark.

use std::fmt::Write as _;

use crate::{
    evaluate::{Domination, Example, Lead, MethodResult, PointResult, Results},
    metrics::Interval,
};

const STYLE: &str = "
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1c1c1e; --soft: #f2f2f5; --line: #d5d5da; --quiet: #63636b; }
@media (prefers-color-scheme: dark) { :root { --ground: #17181b; --ink: #e8e8ea; --soft: #222328; --line: #3c3d44; --quiet: #a0a0a8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem; max-width: 62rem; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p, li { max-width: 46rem; } .quiet { color: var(--quiet); font-size: .9rem; }
figure { margin: 1rem 0; overflow-x: auto; } figure svg { width: 100%; min-width: 30rem; height: auto; display: block; color: var(--ink); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; vertical-align: top; }
th:first-child, td:first-child { text-align: left; } small { color: var(--quiet); display: block; }
.answers { display: flex; gap: .8rem; overflow-x: auto; padding-bottom: .5rem; }
.answer { flex: 0 0 15rem; background: var(--soft); border-radius: .5rem; padding: .7rem .8rem; font-size: .88rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.answer b { display: block; margin-bottom: .4rem; } details { margin: .6rem 0; } summary { cursor: pointer; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; font-size: .8rem; border-radius: .5rem; }
";

/// `pictures`: titles and SVG.
pub fn page(results: &Results, pictures: &[(&str, String)]) -> String {
    let title = escape(&results.config.title);
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n\
         <style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
    );
    page.push_str(&introduction(results));
    for (title, svg) in pictures {
        let _ = writeln!(page, "<h2>{}</h2>\n<figure>{}</figure>", escape(title), themed(svg));
    }
    page.push_str(&summary_table(results));
    page.push_str(&domination_table(results));
    page.push_str(&lead_table(results));
    page.push_str("<h2>Answers side by side</h2>\n");
    for example in &results.examples {
        page.push_str(&example_block(results, example));
    }
    page.push_str("<h2>Every point</h2>\n");
    for method in &results.methods {
        page.push_str(&method_table(results, method));
    }
    let config = serde_json::to_string_pretty(&results.config).unwrap_or_default();
    let models = serde_json::to_string_pretty(&results.models).unwrap_or_default();
    let _ = writeln!(
        page,
        "<details><summary>Configuration and fingerprints of the models</summary>\
         <pre>{}\n{}</pre></details>\n</body>\n</html>",
        escape(&config),
        escape(&models)
    );
    page
}

fn introduction(results: &Results) -> String {
    let config = &results.config;
    let objectives: Vec<String> = config
        .objectives
        .iter()
        .map(|own| {
            format!(
                "<li><b>{}</b>, scored by <code>{}</code>; reference {}, ideal {}</li>",
                escape(&own.name),
                escape(&own.oracle),
                own.reference,
                own.ideal
            )
        })
        .collect();
    format!(
        "<p>{} prompts, {} seed(s), {} preferences, {} methods: {} answers of at most {} tokens at temperature {}, \
         {} tokens in all. Guidance strength w = {} where a method has none of its own.</p>\n\
         <ul>{}</ul>\n\
         <p class=\"quiet\">Scores are means; intervals are 95 %, from {} resamples of the prompts. Hypervolume is \
         measured from the fixed reference point; normalised numbers put the reference at 0 and the ideal at 1. \
         Length stands beside every score, because losses over sums of log-probabilities favour short answers by \
         themselves. distinct-2 and repetition show answers that loop.</p>\n",
        results.prompts,
        config.seeds.len(),
        results.grid.len(),
        results.methods.len(),
        results.answers,
        config.max_tokens,
        config.temperature,
        results.tokens,
        config.strength,
        objectives.concat(),
        config.resamples
    )
}

fn summary_table(results: &Results) -> String {
    let mut rows = String::new();
    for method in &results.methods {
        let steps = match method.right_steps.as_slice() {
            [] => "–".to_owned(),
            steps => {
                let all = method.points.len() - 1;
                steps.iter().map(|right| format!("{right}/{all}")).collect::<Vec<_>>().join(", ")
            }
        };
        let lengths = || method.points.iter().map(|point| point.tokens);
        let (short, long) = (lengths().fold(f64::MAX, f64::min), lengths().fold(0.0, f64::max));
        let length =
            if method.has_front() { format!("{short:.0} – {long:.0}") } else { format!("{long:.0}") };
        let _ = writeln!(
            rows,
            "<tr><td>{}</td><td>{}</td>{}{}{}{}<td>{steps}</td><td>{length}</td></tr>",
            escape(&method.name),
            method.answers,
            figure(&method.hypervolume),
            figure(&method.hypervolume_normalised),
            figure(&method.mean_inner_product),
            figure(&method.mean_inner_product_normalised)
        );
    }
    let names: Vec<&str> = results.config.objectives.iter().map(|own| own.name.as_str()).collect();
    format!(
        "<h2>Methods</h2>\n<div class=\"scroll\"><table>\n<tr><th>method</th><th>answers</th><th>hypervolume</th><th>normalised</th>\
         <th>mean inner product</th><th>normalised</th><th>right steps<small>{}</small></th><th>tokens</th></tr>\n\
         {rows}</table></div>\n\
         <p class=\"quiet\">Answers: to each prompt, at each preference. Right steps: of the steps along the grid, those that move the objective's mean the way its \
         weight goes.</p>\n",
        escape(&names.join(", "))
    )
}

fn domination_table(results: &Results) -> String {
    if results.domination.is_empty() {
        return String::new();
    }
    let row = |found: &Domination| {
        format!(
            "<tr><td>{}</td><td>{}</td><td>{} of {}</td><td>{}</td><td>{}</td></tr>\n",
            escape(&found.front),
            escape(&found.over),
            found.points,
            found.of,
            found.paired,
            found.disjoint
        )
    };
    format!(
        "<h2>Points that are better in every objective</h2>\n<div class=\"scroll\"><table>\n\
         <tr><th>front of</th><th>over</th><th>points</th><th>surely, over the same prompts</th>\
         <th>with disjoint intervals</th></tr>\n{}</table></div>\n",
        results.domination.iter().map(row).collect::<String>()
    )
}

fn lead_table(results: &Results) -> String {
    let Some(Lead { front, .. }) = results.leads.first() else { return String::new() };
    let row = |lead: &Lead| {
        format!(
            "<tr><td>{}</td>{}{}</tr>\n",
            escape(&lead.over),
            figure(&lead.hypervolume),
            figure(&lead.mean_inner_product)
        )
    };
    format!(
        "<h2>Lead of {}</h2>\n<div class=\"scroll\"><table>\n\
         <tr><th>over</th><th>hypervolume</th><th>mean inner product</th></tr>\n{}</table></div>\n\
         <p class=\"quiet\">Differences over the same draws of prompts: intervals that do not hold 0 are a lead, or a lag.</p>\n",
        escape(front),
        results.leads.iter().map(row).collect::<String>()
    )
}

fn example_block(results: &Results, example: &Example) -> String {
    let answer = |own: &crate::evaluate::ExampleAnswer| {
        let title = match own.preference.is_empty() {
            true => own.method.clone(),
            false => preference(results, &own.preference),
        };
        format!(
            "<div class=\"answer\"><b>{}</b>{}<small>{} tokens</small></div>",
            escape(&title),
            escape(own.text.trim()),
            own.tokens
        )
    };
    format!(
        "<h3>{}</h3>\n<p class=\"quiet\">{}, first seed</p>\n<div class=\"answers\">{}</div>\n",
        escape(&example.prompt),
        escape(&example.method),
        example.answers.iter().map(answer).collect::<String>()
    )
}

fn method_table(results: &Results, method: &MethodResult) -> String {
    let row = |point: &PointResult| {
        let name = match point.preference.is_empty() {
            true => "any".to_owned(),
            false => preference(results, &point.preference),
        };
        format!(
            "<tr><td>{}</td>{}<td>{:.1}</td><td>{:.0} %</td><td>{:.3}</td><td>{:.3}</td></tr>\n",
            escape(&name),
            point.scores.iter().map(figure).collect::<String>(),
            point.tokens,
            100.0 * point.finished,
            point.distinct_2,
            point.repetition
        )
    };
    let names = results.config.objectives.iter().map(|own| format!("<th>{}</th>", escape(&own.name)));
    format!(
        "<details open><summary>{}</summary>\n<div class=\"scroll\"><table>\n<tr><th>preference</th>{}<th>tokens</th>\
         <th>finished</th><th>distinct-2</th><th>repetition</th></tr>\n{}</table></div></details>\n",
        escape(&method.name),
        names.collect::<String>(),
        method.points.iter().map(row).collect::<String>()
    )
}

/// `positive 70 %, concise 30 %`
fn preference(results: &Results, weights: &[f32]) -> String {
    let named = results.config.objectives.iter().zip(weights);
    let parts: Vec<String> =
        named.map(|(own, weight)| format!("{} {:.0} %", own.name, 100.0 * weight)).collect();
    parts.join(", ")
}

fn figure(own: &Interval) -> String {
    format!("<td>{:.3}<small>{:.3} to {:.3}</small></td>", own.value, own.low, own.high)
}

/// A picture that takes its black and white from the page.
fn themed(svg: &str) -> String {
    svg.replace("#FFFFFF", "var(--ground)").replace("#000000", "currentColor")
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
