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
    let text = |answer: &'a Transcript| answer.choices.first().map_or("", |choice| choice.text.as_str());
    let columns = columns.into_iter().map(|(title, answer)| (title, text(answer)));
    for line in lay_out(&columns.collect::<Vec<_>>(), width) {
        println!("{line}");
    }
}

/// Titles above a rule, texts below it.
fn lay_out(columns: &[(&str, &str)], width: usize) -> Vec<String> {
    let [titles, texts] = [0, 1].map(|part| {
        let part = columns.iter().map(|(title, text)| if part == 0 { title } else { text.trim() });
        part.map(|text| wrap(text, width)).collect::<Vec<_>>()
    });
    let rule = vec![vec!["-".repeat(width)]; columns.len()];
    [titles, rule, texts].iter().flat_map(|cells| rows(cells, width)).collect()
}

/// Cells beside each other, filled up to the longest.
fn rows(cells: &[Vec<String>], width: usize) -> Vec<String> {
    let height = cells.iter().map(Vec::len).max().unwrap_or(0);
    let row = |index: usize| {
        let line: Vec<String> = cells
            .iter()
            .map(|cell| {
                let text = cell.get(index).map_or("", String::as_str);
                format!("{text}{}", " ".repeat(width.saturating_sub(text.chars().count())))
            })
            .collect();
        line.join(" | ").trim_end().to_owned()
    };
    (0..height).map(row).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rule_is_below_the_longest_title() {
        let columns = [("one", "a b c d e f"), ("two words here", "x")];
        assert_eq!(
            lay_out(&columns, 9),
            [
                "one       | two words",
                "          | here",
                "--------- | ---------",
                "a b c d e | x",
                "f         |"
            ]
        );
    }
}
