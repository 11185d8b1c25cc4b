//! What is printed: for people, or as JSON, one object per line.

use std::fmt::Display;
use std::io::{self, Write};

use serde::Serialize;
use serde_json::{Value, json};

use crate::exit::Exit;

/// Where results and messages go. Results go to stdout. Messages go to stderr, as stdout is the command's in `tenure
/// run`.
pub(crate) struct Output {
    json: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Prints a result to stdout.
    pub(crate) fn result(&self, text: impl Display, data: impl Serialize) {
        match (self.json, serde_json::to_string(&data)) {
            (true, Ok(data)) => write(&mut io::stdout(), &data),
            // Nothing that is printed here can't be serialized.
            _ => write(&mut io::stdout(), &text),
        }
    }

    /// Prints what has happened to stderr.
    pub(crate) fn event(&self, name: &str, text: impl Display, fields: Value) {
        if !self.json {
            return write(&mut io::stderr(), &format_args!("tenure: {text}"));
        }
        let mut data = json!({ "event": name });
        if let (Value::Object(all), Value::Object(fields)) = (&mut data, fields) {
            all.extend(fields);
        }
        write(&mut io::stderr(), &data);
    }

    /// Prints an event that people need not read.
    pub(crate) fn detail(&self, name: &str, fields: Value) {
        if self.json {
            self.event(name, "", fields);
        }
    }

    /// Prints an error, and returns what to exit with.
    pub(crate) fn fail(&self, exit: Exit, error: &dyn Display) -> Exit {
        self.event("failed", error, json!({ "error": error.to_string(), "exit_code": exit.code() }));
        exit
    }
}

/// Prints a line. Where nobody reads, as behind `head`, there is nobody to tell.
fn write(to: &mut impl Write, line: &dyn Display) {
    drop(writeln!(to, "{line}"));
}
