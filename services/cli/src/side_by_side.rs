//! Answers in columns.

use uniarm_proto::Transcript;

/// Narrowest column that reads well.
const COLUMN_MIN: usize = 24;

/// Characters of a line where the terminal does not say.
const LINE: usize = 120;

/// A column for each title and answer, as wide as the terminal has room.
pub fn print<'a>(columns: impl Iterator<Item = (&'a str, &'a Transcript)>) {
    let columns: Vec<_> = columns.collect();
    let terminal = std::env::var("COLUMNS").ok().and_then(|columns| columns.parse().ok()).unwrap_or(LINE);
    let width = (terminal / columns.len().max(1)).saturating_sub(3).max(COLUMN_MIN);
    let cells: Vec<Vec<String>> = columns
        .into_iter()
        .map(|(title, answer)| {
            let text = answer.choices.first().map_or("", |choice| choice.text.as_str());
            let mut lines = wrap(title, width);
            lines.push("-".repeat(width));
            lines.extend(wrap(text.trim(), width));
            lines
        })
        .collect();
    for row in 0..cells.iter().map(Vec::len).max().unwrap_or(0) {
        let line: Vec<String> = cells
            .iter()
            .map(|cell| {
                let text = cell.get(row).map_or("", String::as_str);
                format!("{text}{}", " ".repeat(width.saturating_sub(text.chars().count())))
            })
            .collect();
        println!("{}", line.join(" | ").trim_end());
    }
}

/// Lines of at most `width` characters, broken at spaces.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![];
    for paragraph in text.lines() {
        let mut line = String::new();
        for word in paragraph.split_whitespace() {
            if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > width {
                lines.push(std::mem::take(&mut line));
            }
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
        lines.push(line);
    }
    lines
}
