//! `tenure list`: the locks whose keys begin with a prefix.

use crate::args::ListOptions;
use crate::connect::{connect, exit_of};
use crate::exit::Exit;
use crate::output::Output;
use crate::status::Shown;

pub(crate) async fn list(options: ListOptions, output: &Output) -> Exit {
    let locker = match connect(&options.server, None, output).await {
        Ok(locker) => locker,
        Err(exit) => return exit,
    };
    // One more than is shown, to know whether there are more.
    match locker.list(&options.starting_with, options.limit.saturating_add(1)).await {
        Ok(locks) => {
            for (key, holder) in locks.iter().take(options.limit) {
                let key = key.to_string();
                let shown = Shown::new(&key, std::slice::from_ref(holder));
                output.result(shown.text(), &shown);
            }
            if locks.len() > options.limit {
                let limit = options.limit;
                output.event(
                    "more",
                    format_args!("there are more than {limit}"),
                    serde_json::json!({ "limit": limit }),
                );
            }
            Exit::Success
        }
        Err(error) => output.fail(exit_of(&error), &error),
    }
}
