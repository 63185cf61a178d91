//! The demo as a stranger runs it.

use std::process::Command;

use crate::harness::{demo_model, machine};

/// What it prints.
fn demo(flags: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_uniarm"));
    let output = command.arg("demo").args(flags).env("UNIARM_DEMO_MODEL", demo_model()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    for expected in ["unguided", "positive 100 %", "concise 100 %", "bytes of reward logits", "have stopped"]
    {
        assert!(said.contains(expected), "{expected:?} is missing in:\n{said}");
    }
    said
}

#[test]
fn the_demo_shows_four_answers_side_by_side_and_stops_cleanly() {
    let _machine = machine();
    demo(&["--max-tokens", "12", "--model", demo_model()]);
}

#[test]
fn the_adapter_that_ships_makes_answers_short_where_that_is_asked_for() {
    let _machine = machine();
    let said = demo(&["--max-tokens", "56"]);
    let characters = |column: usize| -> usize {
        said.lines().filter_map(|line| line.split(" | ").nth(column)).map(|cell| cell.trim().len()).sum()
    };
    let (positive, concise) = (characters(1), characters(3));
    assert!(2 * concise < positive, "{concise} and {positive} characters in\n{said}");
}
