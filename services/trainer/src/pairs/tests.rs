//! Every kind of bad line, named; and what good lines become.

#![allow(clippy::unwrap_used)] // a test that panics has failed, and says where

use super::*;

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn written(folder: &tempfile::TempDir, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
    let file = folder.path().join(name);
    std::fs::write(&file, text).unwrap();
    file
}

#[test]
fn every_kind_of_bad_line_is_named_with_file_line_and_field() {
    let cases: &[(&str, Fault, &str)] = &[
        ("{\"prompt\": \"x\"", Fault::Malformed, ""),
        ("", Fault::Malformed, ""),
        ("[1]", Fault::Malformed, ""),
        (
            r#"{"prompt":"x","response_a":"y","response_b":"z","preferred":{"o":"a"},"extra":1}"#,
            Fault::UnknownField,
            "extra",
        ),
        (r#"{"prompt":"x","response_b":"z","preferred":{"o":"a"}}"#, Fault::MissingField, "response_a"),
        (r#"{"response_a":"y","response_b":"z","preferred":{"o":"a"}}"#, Fault::MissingField, "prompt"),
        (
            r#"{"prompt":"x","response_a":7,"response_b":"z","preferred":{"o":"a"}}"#,
            Fault::Malformed,
            "response_a",
        ),
        (
            r#"{"prompt":"x","response_a":" \n","response_b":"z","preferred":{"o":"a"}}"#,
            Fault::EmptyText,
            "response_a",
        ),
        (
            r#"{"prompt":"x","response_a":"y","response_b":"y","preferred":{"o":"a"}}"#,
            Fault::IdenticalResponses,
            "response_b",
        ),
        (
            r#"{"prompt":"x","response_a":"y","response_b":"z","preferred":{"o":"c"}}"#,
            Fault::UnknownLabel,
            "preferred.o",
        ),
        (
            r#"{"prompt":"x","response_a":"y","response_b":"z","preferred":{"q":"a"}}"#,
            Fault::UnknownObjective,
            "preferred.q",
        ),
        (r#"{"prompt":"x","response_a":"y","response_b":"z"}"#, Fault::MissingObjective, ""),
        (
            r#"{"prompt":"x","response_a":"y","response_b":"z","scores":{"o":{"a":NaN,"b":1}}}"#,
            Fault::NotFinite,
            "scores.o.a",
        ),
        (
            r#"{"prompt":"x","response_a":"y","response_b":"z","scores":{"o":{"a":1,"b":-Infinity}}}"#,
            Fault::NotFinite,
            "scores.o.b",
        ),
        (
            r#"{"prompt":"x","response_a":"y","response_b":"z","scores":{"o":{"a":1,"b":1e999}}}"#,
            Fault::NotFinite,
            "scores.o.b",
        ),
        (
            r#"{"prompt":"x","response_a":"y","response_b":"z","scores":{"o":{"a":1}}}"#,
            Fault::MissingField,
            "scores.o.b",
        ),
        (
            r#"{"prompt":"x","response_a":"y","response_b":"z","scores":{"o":{"a":1,"b":0}},"preferred":{"o":"b"}}"#,
            Fault::Contradiction,
            "preferred.o",
        ),
        (
            r#"{"messages":[{"role":"user","content":"x"},{"role":"assistant","content":"w"}],"response_a":"y","response_b":"z","preferred":{"o":"a"}}"#,
            Fault::Malformed,
            "messages",
        ),
        (
            r#"{"messages":[{"role":"user","content":""}],"response_a":"y","response_b":"z","preferred":{"o":"a"}}"#,
            Fault::EmptyText,
            "messages[0].content",
        ),
        (
            r#"{"prompt":"x","response_a":"y","response_b":"z","finished":{"a":true,"b":"no"},"preferred":{"o":"a"}}"#,
            Fault::Malformed,
            "finished.b",
        ),
        (
            r#"{"messages":[{"role":"user","text":"x"}],"response_a":"y","response_b":"z","preferred":{"o":"a"}}"#,
            Fault::UnknownField,
            "messages[0].text",
        ),
    ];
    let folder = tempfile::tempdir().unwrap();
    let text: Vec<&str> = cases.iter().map(|case| case.0).collect();
    let file = written(&folder, "pairs.jsonl", text.join("\n") + "\n");
    let known = names(&["o"]);
    let found = read(std::slice::from_ref(&file), &known, &known, OnBadLine::Skip).unwrap();
    assert!(found.pairs.is_empty());
    for (index, (text, fault, field)) in cases.iter().enumerate() {
        let bad = found.bad.0.iter().find(|bad| bad.place.line == index + 1).unwrap();
        assert_eq!((bad.fault, bad.field.as_str()), (*fault, *field), "{text}: {bad}");
    }
    assert_eq!(found.bad.0.len(), cases.len());
    let error = read(&[file], &known, &known, OnBadLine::Fail).unwrap_err().to_string();
    assert!(error.contains("21 lines of pairs") && error.contains("3 not_finite"), "{error}");
    assert!(error.contains("and 11 more") && error.contains("pairs.jsonl:8: response_a:"), "{error}");
}

#[test]
fn files_that_label_one_objective_each_make_one_pair() {
    let folder = tempfile::tempdir().unwrap();
    let line = |label: &str| {
        let answers = r#""response_a":"y","response_b":"z","finished":{"a":true,"b":false}"#;
        format!(r#"{{"prompt":"x",{answers},"id":"7","meta":[1],{label}}}"#)
    };
    let first = written(&folder, "first", line(r#""preferred":{"o":"b"}"#));
    let second = written(&folder, "second", line(r#""scores":{"q":{"a":0.5,"b":-1}}"#) + "\r\n");
    let known = names(&["o", "q"]);
    let files = [first.clone(), second];
    let found = read(&files, &known, &known, OnBadLine::Fail).unwrap();
    let pair = &found.pairs[0];
    assert_eq!((found.pairs.len(), pair.judgements["o"].sign(), pair.judgements["q"].sign()), (1, -1.0, 1.0));
    assert_eq!(pair.judgements["q"].difference(), Some(1.5));

    // What is written reads as what it was.
    let again = written(&folder, "again", pair.to_json().to_string());
    let reread = read(&[again], &known, &known, OnBadLine::Fail).unwrap();
    assert_eq!(reread.pairs[0].judgements, pair.judgements);
    assert_eq!(reread.pairs[0].finished, [true, false]);
    assert_eq!(reread.pairs[0].content(), pair.content());

    let twice = read(&[first.clone(), first], &known, &[], OnBadLine::Fail).unwrap_err().to_string();
    assert!(twice.contains("already labelled for objective 'o'"), "{twice}");
    let none = read(&files[..1], &known, &known, OnBadLine::Fail).unwrap_err().to_string();
    assert!(none.contains("speaks of objective 'q'"), "{none}");
}

#[test]
fn bytes_that_are_no_text_are_a_bad_line_and_not_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let good = r#"{"prompt":"x","response_a":"y","response_b":"z","preferred":{"o":"a"}}"#;
    let file = written(&folder, "pairs", [b"\xff\xfe\n", good.as_bytes()].concat());
    let found = read(&[file], &[], &names(&["o"]), OnBadLine::Skip).unwrap();
    assert_eq!((found.pairs.len(), found.pairs[0].place.line), (1, 2));
    assert_eq!(found.bad.summary(), "1 malformed");
}
