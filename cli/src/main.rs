//! The command `tenure`: runs commands under distributed locks, and looks after the locks.
//!
//! `args.rs` is what users read: the options, and the manual that `--help` prints. Each command has a file of its own.
//! What all of them print, for people or as JSON, goes through `output.rs`; what they exit with is in `exit.rs`.

#![cfg(unix)]

mod args;
mod breaking;
mod connect;
mod doctor;
mod exit;
mod list;
mod output;
mod run;
mod status;

use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use tokio::runtime::Builder;

use self::args::{Args, Command};
use self::exit::Exit;
use self::output::Output;

fn main() -> ExitCode {
    // Before the arguments are read: it is no command for users.
    if std::env::args_os().nth(1).is_some_and(|argument| argument == run::watcher::COMMAND) {
        run::watcher::watch();
        return ExitCode::SUCCESS;
    }
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) if error.use_stderr() => return refuse(&error).into(),
        Err(help_or_version) => {
            let output = Output::new(json_is_wanted());
            output.printed(help_or_version.print());
            return output.finish(Exit::Success).into();
        }
    };
    let output = Output::new(args.json);
    let exit = execute(args.command, &output);
    output.finish(exit).into()
}

/// Prints what is wrong with the arguments.
fn refuse(error: &clap::Error) -> Exit {
    if !json_is_wanted() {
        drop(error.print());
        return Exit::Usage;
    }
    // The first paragraph. The others are for people: usage, and where to find help.
    let text = error.to_string();
    let words: Vec<_> = text.split("\n\n").next().unwrap_or_default().split_whitespace().collect();
    let output = Output::new(true);
    let exit = output.fail(Exit::Usage, &words.join(" ").trim_start_matches("error: "));
    output.finish(exit)
}

/// Looks for the option where the arguments as a whole are not known.
fn json_is_wanted() -> bool {
    let mut own_options = std::env::args_os().take_while(|argument| argument != "--");
    own_options.any(|argument| argument == "--json")
}

fn execute(command: Command, output: &Output) -> Exit {
    // One thread: whatever it waits for, it waits for together with the lock.
    let runtime = match Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return output.fail(Exit::Unavailable, &format!("could not start: {error}")),
    };
    let exit = runtime.block_on(async {
        match command {
            Command::Run(options) => run::run(options, output).await,
            Command::Status(options) => status::status(options, output).await,
            Command::List(options) => list::list(options, output).await,
            Command::Break(options) => breaking::break_lock(options, output).await,
            Command::Doctor(options) => doctor::doctor(options, output).await,
            Command::Completions { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Args::command(), "tenure", &mut script);
                output.printed(std::io::stdout().write_all(&script));
                Exit::Success
            }
        }
    });
    // What still reads from a terminal must not hold it up.
    runtime.shutdown_background();
    exit
}
