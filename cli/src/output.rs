//! What is printed: for people, or as JSON, one object per line.

use std::cell::OnceCell;
use std::fmt::Display;
use std::io::{self, ErrorKind, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, JoinHandle};

use serde::Serialize;
use serde_json::{Value, json};

use crate::exit::Exit;

/// How many messages wait to be printed. A run has about ten.
const MOST_WAITING: usize = 64;

/// Where results and messages go. Results go to stdout. Messages go to stderr, as stdout is the command's in `tenure
/// run`.
///
/// A thread prints the messages: if stderr is a pipe that is full and nobody reads, printing waits, and whoever watches
/// a command must not.
///
/// What can't be printed is a failure if it is a result. Where nobody reads it any longer, as behind `head`, there is
/// nobody to tell.
pub(crate) struct Output {
    json: bool,
    printer: Option<Printer>,
    /// Why a result could not be printed.
    failure: OnceCell<io::Error>,
}

/// The thread that prints messages.
struct Printer {
    messages: SyncSender<String>,
    thread: JoinHandle<()>,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json, printer: Printer::start(), failure: OnceCell::new() }
    }

    /// Waits until all messages are printed. Returns what to exit with: this, unless a result could not be printed.
    pub(crate) fn finish(self, exit: Exit) -> Exit {
        let exit = match self.failure.get() {
            None => exit,
            Some(error) => self.fail(Exit::NotPrinted, &format_args!("could not print the result: {error}")),
        };
        if let Some(Printer { messages, thread }) = self.printer {
            drop(messages);
            drop(thread.join());
        }
        exit
    }

    /// Prints a result to stdout.
    pub(crate) fn result(&self, text: impl Display, data: impl Serialize) {
        self.printed(match (self.json, serde_json::to_string(&data)) {
            (true, Ok(data)) => write(&mut io::stdout(), &data),
            // Nothing that is printed here can't be serialized.
            _ => write(&mut io::stdout(), &text),
        });
    }

    /// Takes note of what became of a result that was printed to stdout.
    pub(crate) fn printed(&self, result: io::Result<()>) {
        match result.and_then(|()| io::stdout().flush()) {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => drop(self.failure.set(error)),
            _ => {}
        }
    }

    /// Prints what has happened to stderr. Doesn't wait until it is printed.
    pub(crate) fn event(&self, name: &str, text: impl Display, fields: Value) {
        if !self.json {
            return self.print(format!("tenure: {text}"));
        }
        let mut data = json!({ "event": name });
        if let (Value::Object(all), Value::Object(fields)) = (&mut data, fields) {
            all.extend(fields);
        }
        self.print(data.to_string());
    }

    fn print(&self, message: String) {
        match &self.printer {
            // Where so many wait, nobody reads them.
            Some(printer) => drop(printer.messages.try_send(message)),
            None => drop(write(&mut io::stderr(), &message)),
        }
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

impl Printer {
    fn start() -> Option<Self> {
        let (messages, waiting) = sync_channel(MOST_WAITING);
        let thread = Builder::new().name("messages".to_owned()).spawn(move || print_all(&waiting)).ok()?;
        Some(Self { messages, thread })
    }
}

fn print_all(waiting: &Receiver<String>) {
    for message in waiting {
        // There is no other place to say it.
        drop(write(&mut io::stderr(), &message));
    }
}

/// Prints a line, in one piece: a command writes to the same stderr.
fn write(to: &mut impl Write, line: &dyn Display) -> io::Result<()> {
    to.write_all(format!("{line}\n").as_bytes())
}
