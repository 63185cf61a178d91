//! An oracle that is any program: JSON lines in, JSON lines out, in any order.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::process::CommandExt as _,
    process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use super::{Answer, Oracle, OracleError};

/// One call of the program, for all answers that are asked about at once: a judge that loads a model of some
/// gigabytes and reads a few hundred answers fits.
const TIMEOUT: Duration = Duration::from_secs(600);
/// After a fault of its output, until a program is ended: its exit status may tell more than the fault.
const GRACE: Duration = Duration::from_secs(1);
/// Bytes of a line that the program writes: an id and a number.
const LINE_BYTES_MAX: u64 = 4096;
/// Lines read ahead.
const LINES_AHEAD: usize = 64;

/// A program that reads `{"id", "messages", "response"}` and writes `{"id", "score"}`, one line for each answer. It
/// is started for each batch, without a shell, and ends when its input does.
pub struct Program {
    /// As specified: program and arguments.
    line: String,
    timeout: Duration,
}

/// A running program. Whatever it started ends with it.
struct Running(Child);

// === impl Program ===

impl Program {
    /// `line` is the program and its arguments, separated by white space. None where there is no program.
    pub fn new(line: &str) -> Option<Self> {
        let line = line.trim().to_owned();
        (!line.is_empty()).then_some(Self { line, timeout: TIMEOUT })
    }

    fn failed(&self, reason: impl Into<String>) -> OracleError {
        OracleError::Program { program: self.line.clone(), reason: reason.into() }
    }

    fn start(&self) -> Result<(Running, ChildStdin, ChildStdout), OracleError> {
        let mut words = self.line.split_whitespace();
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
        let mut child = command.spawn().map_err(|error| self.failed(format!("does not start: {error}")))?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (stdin, stdout) = pipes.ok_or_else(|| self.failed("has no pipes"))?;
        Ok((Running(child), stdin, stdout))
    }

    /// Scores in the order of the answers.
    fn collect(
        &self,
        lines: &Receiver<Vec<u8>>,
        count: usize,
        deadline: Instant,
    ) -> Result<Vec<f64>, OracleError> {
        let mut scores: Vec<Option<f64>> = vec![None; count];
        for number in 1.. {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = match lines.recv_timeout(left) {
                Ok(line) => line,
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    let scored = scores.iter().flatten().count();
                    let seconds = self.timeout.as_secs();
                    return Err(self.failed(format!("scored {scored} of {count} answers in {seconds} s")));
                }
            };
            let bad = |reason: String| self.failed(format!("line {number} of its output: {reason}"));
            let (id, score) = parse(&line).map_err(bad)?;
            let slot = id.parse().ok().and_then(|index: usize| scores.get_mut(index));
            let slot = slot.ok_or_else(|| bad(format!("id \"{id}\" was not asked about")))?;
            if slot.replace(score).is_some() {
                return Err(bad(format!("id \"{id}\" is scored twice")));
            }
        }
        match scores.iter().position(Option::is_none) {
            None => Ok(scores.into_iter().flatten().collect()),
            Some(first) => {
                let missing = scores.iter().filter(|score| score.is_none()).count();
                Err(self.failed(format!(
                    "{missing} of {count} answers have no score, the first is id \"{first}\""
                )))
            }
        }
    }
}

impl Oracle for Program {
    fn name(&self) -> &str {
        self.line.split_whitespace().next().unwrap_or_default()
    }

    fn score(&mut self, answers: &[Answer<'_>]) -> Result<Vec<f64>, OracleError> {
        if answers.is_empty() {
            return Ok(Vec::new());
        }
        let deadline = Instant::now() + self.timeout;
        let (mut running, stdin, stdout) = self.start()?;
        let (sender, lines) = sync_channel(LINES_AHEAD);
        std::thread::scope(|scope| {
            scope.spawn(move || write_all(stdin, answers));
            scope.spawn(move || read_all(stdout, &sender));
            let scores = self.collect(&lines, answers.len(), deadline);
            // The reader may wait for room, the writer for the program: neither has anybody left to serve.
            drop(lines);
            let grace = if scores.is_ok() { deadline } else { deadline.min(Instant::now() + GRACE) };
            match running.finish(grace) {
                Ok(status) if !status.success() => Err(self.failed(format!("ended with {status}"))),
                Ok(_) => scores,
                Err(reason) => scores.and_then(|_| Err(self.failed(reason))),
            }
        })
    }
}

/// A program may end before it has read everything: what it wrote, and its exit status, tell why.
fn write_all(stdin: ChildStdin, answers: &[Answer<'_>]) {
    let mut stdin = std::io::BufWriter::new(stdin);
    for (index, answer) in answers.iter().enumerate() {
        let message = |m: &uniarm_model::Message| json!({ "role": m.role, "content": m.content });
        let messages: Vec<Value> = answer.messages.iter().map(message).collect();
        let line = json!({ "id": index.to_string(), "messages": messages, "response": answer.response });
        if writeln!(stdin, "{line}").is_err() {
            return;
        }
    }
    let _ = stdin.flush();
}

fn read_all(stdout: ChildStdout, lines: &SyncSender<Vec<u8>>) {
    let mut stdout = BufReader::new(stdout);
    loop {
        let mut line = Vec::new();
        let read = stdout.by_ref().take(LINE_BYTES_MAX + 1).read_until(b'\n', &mut line);
        if !matches!(read, Ok(1..)) || lines.send(line).is_err() {
            return;
        }
    }
}

fn parse(line: &[u8]) -> Result<(String, f64), String> {
    if line.len() as u64 > LINE_BYTES_MAX {
        return Err(format!("over {LINE_BYTES_MAX} bytes"));
    }
    let text = String::from_utf8_lossy(line);
    let text = text.trim();
    let wants = "wants {\"id\": …, \"score\": a finite number}";
    let value: Value = serde_json::from_str(text).map_err(|error| format!("{text}: {error}; {wants}"))?;
    let id = value.get("id").and_then(Value::as_str).ok_or_else(|| format!("{text}: no id; {wants}"))?;
    let score = value.get("score").and_then(Value::as_f64).filter(|score| score.is_finite());
    Ok((id.to_owned(), score.ok_or_else(|| format!("{text}: no finite score; {wants}"))?))
}

// === impl Running ===

impl Running {
    /// Waits for the end; at the deadline it comes. What the program has started and left behind ends too, for it
    /// may hold the pipes that others wait at.
    fn finish(&mut self, deadline: Instant) -> Result<ExitStatus, String> {
        while !self.has_ended() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        let by_itself = self.has_ended();
        // SAFETY: a plain system call on the process group that was made for this child. It has not been waited
        // for, so its id is not another's.
        unsafe { libc::kill(-(self.0.id() as i32), libc::SIGKILL) };
        let status = self.0.wait().map_err(|error| format!("cannot be waited for: {error}"))?;
        if by_itself { Ok(status) } else { Err("does not end though its input has".to_owned()) }
    }

    /// Without taking its exit status, so that its id stays its own.
    fn has_ended(&self) -> bool {
        // SAFETY: the structure is plain numbers, for which zero is a value, and the call writes no other memory.
        unsafe {
            let mut about: libc::siginfo_t = std::mem::zeroed();
            let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
            libc::waitid(libc::P_PID, self.0.id(), &raw mut about, options) != 0 || about.si_pid() != 0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An interpreter of our tests' machine.
    fn shell(script: &str) -> Result<Vec<f64>, OracleError> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("judge.sh");
        std::fs::write(&file, script).unwrap();
        let mut program = Program::new(&format!("sh {}", file.display())).unwrap();
        program.timeout = Duration::from_secs(2);
        let messages = [uniarm_model::Message { role: "user".to_owned(), content: "Hi".to_owned() }];
        let answers: Vec<Answer<'_>> =
            ["a", "bb", "ccc"].iter().map(|response| Answer { messages: &messages, response }).collect();
        program.score(&answers)
    }

    fn reason(script: &str) -> String {
        shell(script).unwrap_err().to_string()
    }

    #[test]
    fn scores_may_come_in_any_order() {
        let scores = shell(
            r#"cat > /dev/null
            echo '{"id": "2", "score": 3}'; echo '{"id": "0", "score": -1.5}'; echo '{"id": "1", "score": 2e0}'"#,
        );
        assert_eq!(scores.unwrap(), [-1.5, 2.0, 3.0]);
    }

    #[test]
    fn program_reads_what_it_is_asked() {
        let scores = shell(
            r#"while read -r line; do
            id=$(echo "$line" | sed 's/.*"id":"\([0-9]\)".*/\1/'); letters=$(echo "$line" | sed 's/.*"response":"\([a-z]*\)".*/\1/')
            echo "{\"id\": \"$id\", \"score\": ${#letters}}"; done"#,
        );
        assert_eq!(scores.unwrap(), [1.0, 2.0, 3.0]);
    }

    #[test]
    fn every_fault_of_a_program_is_named() {
        let missing = reason(r#"cat > /dev/null; echo '{"id": "1", "score": 1}'"#);
        assert!(missing.ends_with("2 of 3 answers have no score, the first is id \"0\""), "{missing}");
        let twice =
            reason(r#"cat > /dev/null; echo '{"id": "1", "score": 1}'; echo '{"id": "1", "score": 1}'"#);
        assert!(twice.contains("line 2 of its output: id \"1\" is scored twice"), "{twice}");
        let not_asked = reason(r#"cat > /dev/null; echo '{"id": "7", "score": 1}'"#);
        assert!(not_asked.contains("id \"7\" was not asked about"), "{not_asked}");
        let nan = reason(r#"cat > /dev/null; echo '{"id": "0", "score": NaN}'"#);
        assert!(nan.contains("line 1") && nan.contains("finite number"), "{nan}");
        let endless = reason("cat > /dev/null; head -c 100000 /dev/zero | tr '\\0' x; sleep 100");
        assert!(endless.contains("over 4096 bytes"), "{endless}");
        assert!(reason("exit 3").contains("ended with exit status: 3"));
        assert!(Program::new("  ").is_none());
        let absent =
            Program::new("/no/such/program").unwrap().score(&[Answer { messages: &[], response: "" }]);
        assert!(absent.unwrap_err().to_string().contains("does not start"));
    }

    #[test]
    fn program_that_hangs_is_ended_with_all_it_started() {
        let began = Instant::now();
        let hangs = reason("sleep 100 & sleep 100");
        assert!(hangs.contains("scored 0 of 3 answers in 2 s"), "{hangs}");
        assert!(began.elapsed() < Duration::from_secs(10));
    }
}
