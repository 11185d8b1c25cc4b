//! Draws what a benchmark has measured, as an SVG file: `-- --svg FILE`.

use std::fmt::Write;
use std::path::PathBuf;
use std::{fs, iter};

use crate::machine;

/// Returns whether `--quick` was given, and the file to draw to, if there is one.
pub(crate) fn arguments(mut args: impl Iterator<Item = String>) -> Result<(bool, Option<PathBuf>), String> {
    let (mut others, mut file) = (Vec::new(), None);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--svg" => file = Some(args.next().ok_or("`--svg` needs the name of a file")?.into()),
            _ => others.push(arg),
        }
    }
    Ok((machine::is_quick(others.into_iter())?, file))
}

/// Panels of bars, two in a row. Each panel has a scale of its own.
pub(crate) struct Chart {
    pub(crate) title: String,
    /// On what, and how.
    pub(crate) notes: Vec<String>,
    pub(crate) panels: Vec<Panel>,
}

pub(crate) struct Panel {
    pub(crate) title: String,
    pub(crate) bars: Vec<(String, f64)>,
}

const WIDTH: f64 = 860.0;
const BAR: f64 = 18.0;
/// Where the bars of a panel begin, and how long the longest is.
const LABELS: f64 = 158.0;
const LONGEST: f64 = 190.0;

impl Chart {
    pub(crate) fn write(&self, file: &PathBuf) -> Result<(), String> {
        // Cargo runs a benchmark in the folder of its package.
        fs::write(file, self.svg()).map_err(|error| format!("{}: {error}", file.display()))
    }

    fn svg(&self) -> String {
        let most = self.panels.iter().map(|panel| panel.bars.len()).max().unwrap_or_default() as f64;
        let (top, high) = (44.0 + 17.0 * self.notes.len() as f64, 44.0 + most * BAR);
        let height = top + high * self.panels.len().div_ceil(2) as f64;
        let mut svg = String::new();
        let mut line = |text: String| svg.extend([text.as_str(), "\n"]);
        line(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
             font-family=\"system-ui, sans-serif\" font-size=\"12\">"
        ));
        line(format!("<rect width=\"{WIDTH}\" height=\"{height}\" rx=\"8\" fill=\"#fbfbfa\"/>"));
        let titles = iter::once((&self.title, "font-size=\"15\" font-weight=\"600\" fill=\"#222\""));
        let notes = self.notes.iter().map(|note| (note, "fill=\"#666\""));
        for (i, (text, style)) in titles.chain(notes).enumerate() {
            line(format!("<text x=\"16\" y=\"{}\" {style}>{}</text>", 26.0 + 17.0 * i as f64, escaped(text)));
        }
        for (i, panel) in self.panels.iter().enumerate() {
            let (x, y) = ((i % 2) as f64 * WIDTH / 2.0, top + (i / 2) as f64 * high);
            line(panel.svg(x, y));
        }
        line("</svg>".to_owned());
        svg
    }
}

impl Panel {
    fn svg(&self, x: f64, y: f64) -> String {
        let longest = self.bars.iter().map(|(_, value)| *value).fold(f64::MIN_POSITIVE, f64::max);
        let title = escaped(&self.title);
        let mut svg = format!("<g transform=\"translate({x} {y})\">");
        let _ = write!(svg, "<text x=\"16\" y=\"24\" font-weight=\"600\" fill=\"#333\">{title}</text>");
        for (i, (label, value)) in self.bars.iter().enumerate() {
            let (top, length) = (34.0 + i as f64 * BAR, (LONGEST * value / longest).max(1.0));
            let (text, end) = (top + 11.5, LABELS + length + 6.0);
            let color = if label.starts_with("tenure") { "#3f8f5f" } else { "#a9adb5" };
            let label = escaped(label);
            let _ = write!(
                svg,
                "<text x=\"{}\" y=\"{text}\" text-anchor=\"end\" fill=\"#333\">{label}</text>\
                 <rect x=\"{LABELS}\" y=\"{top}\" width=\"{length:.1}\" height=\"{}\" rx=\"2\" fill=\"{color}\"/>\
                 <text x=\"{end:.1}\" y=\"{text}\" fill=\"#333\">{}</text>",
                LABELS - 8.0,
                BAR - 4.0,
                in_thousands(*value),
            );
        }
        svg + "</g>"
    }
}

/// `12,345`
fn in_thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
    groups.join(",")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
