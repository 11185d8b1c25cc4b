//! Draws what a benchmark has measured, as an SVG file: `-- --svg FILE`.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

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
    pub(crate) title: &'static str,
    /// What was measured, on what, and how; one line each.
    pub(crate) notes: Vec<String>,
    pub(crate) panels: Vec<Panel>,
}

pub(crate) struct Panel {
    pub(crate) title: String,
    pub(crate) bars: Vec<(&'static str, f64)>,
}

const WIDTH: u32 = 860;
/// The height of a line of text, and of a bar with the gap to the next.
const LINE: u32 = 19;
/// The height of a panel's title, with the space around it.
const TITLE: u32 = 46;
/// The space below the last panels.
const FOOT: u32 = 16;

const BACKGROUND: RGBColor = RGBColor(251, 251, 250);
const TEXT: RGBColor = RGBColor(51, 51, 51);
const OURS: RGBColor = RGBColor(63, 143, 95);
const THEIRS: RGBColor = RGBColor(169, 173, 181);

type Drawn = Result<(), Box<dyn Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

impl Chart {
    pub(crate) fn write(&self, file: &Path) -> Result<(), String> {
        let mut svg = String::new();
        let drawn = self.draw(&mut svg).and_then(|()| Ok(fs::write(file, svg)?));
        drawn.map_err(|error| format!("{}: {error}", file.display()))
    }

    fn draw(&self, svg: &mut String) -> Drawn {
        let rows = self.panels.len().div_ceil(2);
        let bars = self.panels.iter().map(|panel| panel.bars.len()).max().unwrap_or_default();
        let head = TITLE + LINE * self.notes.len() as u32;
        let body = rows as u32 * (TITLE + LINE * bars as u32);
        let area = SVGBackend::with_string(svg, (WIDTH, head + body + FOOT)).into_drawing_area();
        area.fill(&BACKGROUND)?;
        let (top, panels) = area.split_vertically(head);
        let (panels, _foot) = panels.split_vertically(body);
        top.draw_text(self.title, &heading(19), (16, 16))?;
        for (note, y) in self.notes.iter().zip((TITLE..).step_by(LINE as usize)) {
            top.draw_text(note, &font(14), (16, y as i32))?;
        }
        for (panel, area) in self.panels.iter().zip(panels.split_evenly((rows, 2))) {
            panel.draw(&area)?;
        }
        area.present()?;
        Ok(())
    }
}

impl Panel {
    fn draw(&self, area: &Area<'_>) -> Drawn {
        let longest = self.bars.iter().map(|(_, value)| *value).fold(f64::MIN_POSITIVE, f64::max);
        let bars = ChartBuilder::on(area)
            .margin_top(14)
            .caption(&self.title, heading(15))
            .set_label_area_size(LabelAreaPosition::Left, 170)
            .set_label_area_size(LabelAreaPosition::Right, 60)
            .build_cartesian_2d(0.0..longest, self.bars.len() as f64..0.0)?;
        let bars = bars.plotting_area();
        for (i, (name, value)) in self.bars.iter().enumerate() {
            let (top, color) = (i as f64, if name.starts_with("tenure") { OURS } else { THEIRS });
            bars.draw(&Rectangle::new([(0.0, top + 0.1), (*value, top + 0.9)], color.filled()))?;
            let text = |side| font(14).pos(Pos::new(side, VPos::Center));
            bars.draw(&(EmptyElement::at((0.0, top + 0.5)) + Text::new(*name, (-8, 0), text(HPos::Right))))?;
            let figure = Text::new(in_thousands(*value), (6, 0), text(HPos::Left));
            bars.draw(&(EmptyElement::at((*value, top + 0.5)) + figure))?;
        }
        Ok(())
    }
}

/// In plotters, a size is somewhat more than that of the letters in the file.
fn font(size: u32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&TEXT)
}

fn heading(size: u32) -> TextStyle<'static> {
    ("sans-serif", size, FontStyle::Bold).into_font().color(&TEXT)
}

/// `12,345`
fn in_thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
    groups.join(",")
}
