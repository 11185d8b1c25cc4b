//! `tenure doctor`: what endangers locks on a server.

use tenure::Severity;

use crate::args::DoctorOptions;
use crate::connect::{connect, exit_of};
use crate::exit::Exit;
use crate::output::Output;

pub(crate) async fn doctor(mut options: DoctorOptions, output: &Output) -> Exit {
    if !options.urls.is_empty() {
        options.server.url = options.urls;
    }
    let locker = match connect(&options.server, None, output).await {
        Ok(locker) => locker,
        Err(exit) => return exit,
    };
    match locker.diagnose().await {
        Ok(diagnosis) => {
            output.result(&diagnosis, &diagnosis);
            match diagnosis.worst() {
                None | Some(Severity::Note) => Exit::Success,
                Some(Severity::Danger) => Exit::Danger,
                Some(_) => Exit::Minor,
            }
        }
        Err(error) => output.fail(exit_of(&error), &error),
    }
}
