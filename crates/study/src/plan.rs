//! From a study file to cells.

use crate::constraints::{meet_scale, solve_parameters, unknown};
use crate::disk::{sha256, sha256_of};
use crate::error::{Error, Result};
use crate::grid::{Axis, Point, axes, compared, label_exists, points};
use crate::host::Recipes;
use crate::spec::{Combine, Constraint, EvalOptions, Keep, Paper, Spec, TestOn};
use crate::split::Splitter;
use crate::store::{CELLS, CellFile, DATA, FORMAT, Kind, RECIPE, Store};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// Hexadecimal digits of a cell's name.
const NAME_LEN: usize = 16;
/// Commands that make one adapter of several.
const COMBINING: [&str; 2] = ["compose", "import"];
/// The recipe key of seeds.
const SEED: &str = "train.seed";

/// A planned study, as `plan.json` holds it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Version of the format.
    pub format: u32,
    /// The study's name.
    pub name: String,
    /// Heading of the report.
    pub title: String,
    /// What the study asks.
    pub question: Option<String>,
    /// Axes with all their labels, in order.
    pub axes: Vec<(String, Vec<String>)>,
    /// The axis whose labels are compared.
    pub compare: String,
    /// The label that the others are tested against.
    pub reference: Option<String>,
    /// The axis of which every variant's best value is chosen.
    pub tune: Option<String>,
    /// By what it is chosen.
    pub select: String,
    /// What the report shows.
    pub metrics: Vec<String>,
    /// A paper's numbers.
    pub paper: Option<Paper>,
    /// Whose weights are kept.
    pub keep: Keep,
    /// What the reader of a report has to know of the plan.
    pub notes: Vec<String>,
    /// The cells, in the order in which they are run.
    pub cells: Vec<Planned>,
}

/// A cell's place in a plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Planned {
    /// The cell's name. Points whose recipes come to the same share a cell.
    pub id: String,
    /// Axis → label.
    pub labels: BTreeMap<String, String>,
    /// The seed; none for what nothing random is in.
    pub seed: Option<u64>,
    /// What is done in it.
    pub kind: Kind,
    /// Trainable parameters, where they are known before the run.
    pub parameters: Option<u64>,
    /// The points whose adapters it is made of: each Axis → label.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<BTreeMap<String, String>>,
}

impl Planned {
    /// Its labels without the tuned axis: what one value is chosen for.
    pub fn group(&self, tune: Option<&str>) -> BTreeMap<String, String> {
        let kept = self.labels.iter().filter(|(axis, _)| Some(axis.as_str()) != tune);
        kept.map(|(axis, label)| (axis.clone(), label.clone())).collect()
    }
}

struct Planner<'a> {
    spec: &'a Spec,
    recipes: &'a dyn Recipes,
    /// Where the study file's relative paths start.
    folder: &'a Path,
    /// The study's folder, absolute.
    root: PathBuf,
    splitter: Option<Splitter<'a>>,
    task_files: HashMap<PathBuf, String>,
    /// Solved values by what they follow from.
    solved: HashMap<String, Vec<(String, Value)>>,
    counted: HashMap<String, Option<u64>>,
    compare: String,
    axes: Vec<Axis>,
    /// Points of the reference labels, by their other labels.
    notes: Vec<String>,
}

/// A cell before it is written.
struct Made {
    file: CellFile,
    recipe: String,
    planned: Planned,
}

/// Expands `spec`, whose relative paths start from `folder`, into the store: new cells are written, cells
/// that are there already stay as they are. `text` is the study file, kept with the plan.
///
/// # Errors
/// If the study file asks for something impossible, the folder holds another study, or it cannot be
/// written.
pub fn plan(
    spec: &Spec,
    text: &str,
    folder: &Path,
    store: &Store,
    recipes: &dyn Recipes,
) -> Result<(Plan, usize)> {
    store.claim_for(&spec.name)?;
    let axes = axes(&spec.grid)?;
    let compare = compared(spec, &axes)?;
    for constraint in &spec.constraints {
        let (reference, labels) = match constraint {
            Constraint::EqualParameters(equal) => (&equal.reference, &equal.labels),
            Constraint::EqualScale(equal) => (&equal.reference, &equal.labels),
        };
        for label in std::iter::once(reference).chain(labels.iter().flatten()) {
            label_exists("constraints", label, &compare, &axes)?;
        }
    }
    let points = points(&axes, spec.tune.as_deref())?;
    let data = store.root().join(DATA);
    let mut planner = Planner {
        spec,
        recipes,
        folder,
        root: store.root().to_path_buf(),
        splitter: spec.split.map(|split| Splitter::new(split, folder, &data)),
        task_files: HashMap::new(),
        solved: HashMap::new(),
        counted: HashMap::new(),
        compare,
        axes,
        notes: Vec::new(),
    };
    let mut made = Vec::new();
    for point in &points {
        let seeds: Vec<Option<u64>> = match point.untrained {
            true => vec![None],
            false => spec.seeds.list().into_iter().map(Some).collect(),
        };
        for seed in seeds {
            made.push(planner.cell(point, seed, &points)?);
        }
    }
    planner.budgets(&points);
    let written = write(store, &made)?;
    let plan = Plan {
        format: FORMAT,
        name: spec.name.clone(),
        title: spec.title.clone().unwrap_or_else(|| spec.name.clone()),
        question: spec.question.clone(),
        axes: labels_in_order(&planner.axes, &made),
        compare: planner.compare,
        reference: spec.reference.clone(),
        tune: spec.tune.clone(),
        select: spec.select.clone(),
        metrics: spec.metrics.clone(),
        paper: spec.paper.clone(),
        keep: spec.keep,
        notes: planner.notes,
        cells: made.into_iter().map(|made| made.planned).collect(),
    };
    store.save_plan(&plan, text)?;
    Ok((plan, written))
}

/// Every axis with the labels that occur: its own first, then those of variants alone.
fn labels_in_order(axes: &[Axis], made: &[Made]) -> Vec<(String, Vec<String>)> {
    let mut found: Vec<(String, Vec<String>)> = Vec::new();
    for axis in axes {
        let own = axis.variants.iter().map(|variant| variant.label.clone());
        let mut labels: Vec<String> = own.collect();
        for made in made {
            if let Some(label) = made.planned.labels.get(&axis.name)
                && !labels.contains(label)
            {
                labels.push(label.clone());
            }
        }
        let numbers: Option<Vec<f64>> = labels.iter().map(|label| label.parse().ok()).collect();
        if let Some(numbers) = numbers {
            let mut order: Vec<usize> = (0..labels.len()).collect();
            order.sort_by(|a, b| numbers[*a].total_cmp(&numbers[*b]));
            labels = order.into_iter().map(|index| labels[index].clone()).collect();
        }
        found.push((axis.name.clone(), labels));
    }
    found
}

/// Writes cells that are not there yet, and makes sure of those that are.
fn write(store: &Store, made: &[Made]) -> Result<usize> {
    let mut written = 0;
    for cell in made {
        written += usize::from(store.add_cell(&cell.file, &cell.recipe)?);
    }
    Ok(written)
}

impl Planner<'_> {
    fn cell(&mut self, point: &Point, seed: Option<u64>, points: &[Point]) -> Result<Made> {
        let place = || {
            let labels: Vec<String> =
                point.labels.iter().map(|(axis, label)| format!("{axis} {label}")).collect();
            labels.join(", ")
        };
        self.cell_at(point, seed, points).map_err(|error| match error {
            Error::Bad(message) => Error::Bad(format!("{}: {message}", place())),
            other => other,
        })
    }

    fn cell_at(&mut self, point: &Point, seed: Option<u64>, points: &[Point]) -> Result<Made> {
        let (mut recipe, test) = self.recipe_of(point, seed)?;
        self.constrain(point, &mut recipe, points)?;
        let resolved = self.recipes.resolve(&recipe, self.folder)?;
        let trained = !point.untrained && point.combine.is_none();
        let parameters = if trained { self.count(&resolved.recipe)? } else { None };
        let mut tasks: Vec<String> =
            test.iter().map(|path| format!("loss:{}", path.display())).collect();
        tasks.extend(self.spec.tasks.iter().chain(&point.tasks).cloned());
        let eval = self.spec.eval.with(&point.eval);
        let (tasks, task_identity) = self.tasks(&tasks)?;
        let eval = self.eval(eval)?;
        let combine = self.command(point.combine.as_ref())?;
        let sources = match &point.combine {
            Some(combine) => self.sources(point, combine, points)?,
            None => Vec::new(),
        };
        let kind = match (&point.combine, point.untrained) {
            (Some(_), _) => Kind::Combined,
            (None, true) => Kind::Untrained,
            (None, false) => Kind::Trained,
        };
        if kind != Kind::Trained && tasks.is_empty() {
            return Err(Error::bad("is not trained and there are no tasks to score it on"));
        }
        // What is made of others follows from their recipes, whichever of their values turns out best.
        let mut of = Vec::new();
        for source in &sources {
            let of_source = |other: &&Point| {
                source.iter().all(|(axis, label)| label_on(other, axis) == Some(label.as_str()))
            };
            for other in points.iter().filter(of_source) {
                let (mut recipe, _) = self.recipe_of(other, seed)?;
                self.constrain(other, &mut recipe, points)?;
                of.push(self.recipes.resolve(&recipe, self.folder)?.identity);
            }
        }
        let mut identity = json!({
            "kind": kind,
            "base": resolved.base[1],
            "data": resolved.files.iter().map(|(_, sha256)| sha256).collect::<Vec<_>>(),
            "recipe": without_empty(&resolved.identity),
            "tasks": task_identity,
            "eval": eval,
            "result_format": FORMAT,
        });
        if kind != Kind::Trained {
            // The recipe names the base and nothing else that counts.
            identity["recipe"] = without_empty(&resolved.identity["model"]);
            identity["data"] = Value::Null;
        }
        if !combine.is_empty() {
            let words: Vec<&String> = combine.iter().map(|(_, word)| word).collect();
            identity["combine"] = json!({
                "with": words,
                "of": of.iter().map(without_empty).collect::<Vec<_>>(),
                "seed": seed,
            });
        }
        if let Some(revision) = &self.spec.revision {
            identity["revision"] = revision.clone();
        }
        let id = sha256(identity.to_string().as_bytes())[..NAME_LEN].to_owned();
        let recipe = self.written(&resolved.recipe)?;
        let file = CellFile {
            format: FORMAT,
            id: id.clone(),
            kind,
            identity,
            recipe_sha256: sha256(recipe.as_bytes()),
            base: resolved.base[0].clone(),
            files: resolved
                .files
                .iter()
                .map(|(path, sha)| (self.near(path), sha.clone()))
                .collect(),
            tasks,
            eval,
            combine: combine.iter().map(|(word, _)| word.clone()).collect(),
        };
        let labels = point.labels.iter().cloned().collect();
        let planned = Planned { id, labels, seed, kind, parameters, sources };
        Ok(Made { file, recipe, planned })
    }

    /// The recipe of a point before constraints, and its test files.
    fn recipe_of(&mut self, point: &Point, seed: Option<u64>) -> Result<(Value, Vec<PathBuf>)> {
        let mut recipe = self.spec.base.clone();
        for (key, value) in &point.set {
            self.recipes.set(&mut recipe, key, value)?;
        }
        if let Some(seed) = seed {
            self.recipes.set(&mut recipe, SEED, &json!(seed))?;
        }
        self.recipes.set(&mut recipe, "output", &json!("run"))?;
        let Some(splitter) = &mut self.splitter else { return Ok((recipe, Vec::new())) };
        let mut test = splitter.apply(&mut recipe)?;
        if self.spec.split.is_some_and(|split| split.test_on == TestOn::Base) {
            test = splitter.apply(&mut self.spec.base.clone())?;
        }
        Ok((recipe, test))
    }

    fn count(&mut self, recipe: &Value) -> Result<Option<u64>> {
        let key = format!("{}{}", recipe["model"], recipe["method"]);
        if let Some(count) = self.counted.get(&key) {
            return Ok(*count);
        }
        let count = self.recipes.parameters(recipe)?;
        self.counted.insert(key, count);
        Ok(count)
    }

    /// Makes the study's constraints hold for a point.
    fn constrain(&mut self, point: &Point, recipe: &mut Value, points: &[Point]) -> Result<()> {
        let label = label_on(point, &self.compare).unwrap_or_default().to_owned();
        if self.spec.constraints.is_empty() || point.untrained || point.combine.is_some() {
            return Ok(());
        }
        // Neither seeds nor data nor rates change a count.
        let key = format!("{label}{}{}", recipe["model"], recipe["method"]);
        if let Some(solved) = self.solved.get(&key) {
            for (key, value) in solved {
                self.recipes.set(recipe, key, value)?;
            }
            return Ok(());
        }
        let mut solved = Vec::new();
        for constraint in &self.spec.constraints {
            let (reference, labels) = match constraint {
                Constraint::EqualParameters(equal) => (&equal.reference, &equal.labels),
                Constraint::EqualScale(equal) => (&equal.reference, &equal.labels),
            };
            let meant = labels.as_ref().is_none_or(|labels| labels.contains(&label));
            if *reference == label || !meant {
                continue;
            }
            let other = self.reference_of(point, reference, points)?;
            let key = match constraint {
                Constraint::EqualParameters(equal) => {
                    let wanted = self.count(&other)?.ok_or_else(|| unknown(reference))?;
                    let (recipes, folder) = (self.recipes, self.folder);
                    solve_parameters(recipes, equal, &label, recipe, folder, wanted)?;
                    Some(&equal.solve)
                }
                Constraint::EqualScale(equal) => {
                    let wanted = self.recipes.scale(&other).ok_or_else(|| {
                        Error::bad(format!("constraints.equal_scale: `{reference}` has no scale"))
                    })?;
                    meet_scale(self.recipes, equal, &label, recipe, self.folder, wanted)?;
                    equal.solve.as_ref()
                }
            };
            if let Some(key) = key {
                solved.push((key.clone(), at(recipe, key)));
            }
        }
        self.solved.insert(key, solved);
        Ok(())
    }

    /// The resolved recipe of the reference that is otherwise like `point`.
    fn reference_of(&mut self, point: &Point, reference: &str, points: &[Point]) -> Result<Value> {
        let alike = |other: &&Point| {
            other.labels.iter().all(|(axis, label)| {
                if *axis == self.compare {
                    return label == reference;
                }
                // A reference that has other values of the tuned axis is as good with any of them.
                let tuned = self.spec.tune.as_ref() == Some(axis);
                tuned || label_on(point, axis) == Some(label.as_str())
            })
        };
        let Some(other) = points.iter().find(alike).cloned() else {
            return Err(Error::bad(format!(
                "constraints: there is no cell of `{reference}` that is otherwise alike"
            )));
        };
        let (recipe, _) = self.recipe_of(&other, self.spec.seeds.list().first().copied())?;
        Ok(self.recipes.resolve(&recipe, self.folder)?.recipe)
    }

    /// Tasks as the cell's folder names them, and as its identity does.
    fn tasks(&mut self, tasks: &[String]) -> Result<(Vec<String>, Vec<String>)> {
        let (mut named, mut identity) = (Vec::new(), Vec::new());
        for task in tasks {
            self.recipes.check_task(task)?;
            let Some((family, file)) = task.split_once(':') else {
                named.push(task.clone());
                identity.push(task.clone());
                continue;
            };
            let path = self.folder.join(file);
            if !path.is_file() {
                return Err(Error::bad(format!(
                    "tasks: `{task}`: there is no file {}",
                    path.display()
                )));
            }
            let path = path.canonicalize().map_err(|source| Error::io(&path, source))?;
            if path.to_string_lossy().contains(',') {
                let message = "the path has a comma, at which names of tasks are parted";
                return Err(Error::bad(format!("tasks: `{task}`: {message}; rename the file")));
            }
            let sha256 = match self.task_files.get(&path) {
                Some(sha256) => sha256.clone(),
                None => {
                    let sha256 = sha256_of(&path)?;
                    self.task_files.insert(path.clone(), sha256.clone());
                    sha256
                }
            };
            let stem = path.file_stem().unwrap_or_default().to_string_lossy();
            identity.push(format!("{family}:{stem}:{sha256}"));
            named.push(format!("{family}:{}", self.near(&path).display()));
        }
        Ok((named, identity))
    }

    /// The words of the command that puts adapters together, as the cell's folder and as its identity have
    /// them: files among them by their place and by their content.
    fn command(&self, combine: Option<&Combine>) -> Result<Vec<(String, String)>> {
        let mut words = Vec::new();
        for word in combine.iter().flat_map(|combine| &combine.with) {
            let path = self.folder.join(word);
            words.push(match path.is_file() {
                false => (word.clone(), word.clone()),
                true => {
                    let path = path.canonicalize().map_err(|source| Error::io(&path, source))?;
                    (self.near(&path).display().to_string(), sha256_of(&path)?)
                }
            });
        }
        Ok(words)
    }

    fn eval(&self, mut eval: EvalOptions) -> Result<EvalOptions> {
        if let Some(data) = eval.data.as_deref().filter(|data| *data != "hub") {
            let path = self.folder.join(data);
            let path = path.canonicalize().map_err(|_| {
                Error::bad(format!("eval.data: there is no folder {}", path.display()))
            })?;
            eval.data = Some(path.display().to_string());
        }
        Ok(eval)
    }

    /// The points whose adapters a combined one is made of.
    fn sources(
        &self,
        point: &Point,
        combine: &Combine,
        points: &[Point],
    ) -> Result<Vec<BTreeMap<String, String>>> {
        let fault = |message: String| Error::bad(format!("combine: {message}"));
        let command = combine.with.first().map(String::as_str);
        if !command.is_some_and(|command| COMBINING.contains(&command)) {
            return Err(fault(format!(
                "with: begins with {}; expected {}, as [compose, --how, average]",
                command.map_or("nothing".to_owned(), |command| format!("`{command}`")),
                COMBINING.join(" or ")
            )));
        }
        for axis in combine.of.keys() {
            if !self.axes.iter().any(|known| known.name == *axis) {
                return Err(fault(format!("of: there is no axis `{axis}`")));
            }
        }
        let tune = self.spec.tune.as_deref();
        // In the order in which they are listed, one axis after the other.
        let mut groups: Vec<BTreeMap<String, String>> = vec![
            point
                .labels
                .iter()
                .filter(|(axis, _)| Some(axis.as_str()) != tune && !combine.of.contains_key(axis))
                .cloned()
                .collect(),
        ];
        for (axis, labels) in &combine.of {
            let with = |group: &BTreeMap<String, String>| {
                let with = |label: &String| {
                    let mut group = group.clone();
                    group.insert(axis.clone(), label.clone());
                    group
                };
                labels.iter().map(with).collect::<Vec<_>>()
            };
            groups = groups.iter().flat_map(with).collect();
        }
        for group in &groups {
            let trained = points.iter().any(|other| {
                let alike =
                    group.iter().all(|(axis, label)| label_on(other, axis) == Some(label.as_str()));
                alike && !other.untrained && other.combine.is_none()
            });
            if !trained {
                return Err(fault(format!("no trained cell has {}", shown(group))));
            }
        }
        Ok(groups)
    }

    /// A recipe as the cell's folder holds it.
    fn written(&self, recipe: &Value) -> Result<String> {
        let mut recipe = recipe.clone();
        self.shorten(&mut recipe);
        serde_saphyr::to_string(&recipe).map_err(|error| Error::Failed(error.to_string()))
    }

    /// Names files inside the study relative to a cell, so that the study may be moved.
    fn shorten(&self, value: &mut Value) {
        match value {
            Value::String(text) => {
                let path = Path::new(text.as_str());
                if path.is_absolute() && path.starts_with(&self.root) {
                    *text = self.near(path).display().to_string();
                }
            }
            Value::Array(items) => items.iter_mut().for_each(|item| self.shorten(item)),
            Value::Object(map) => map.values_mut().for_each(|item| self.shorten(item)),
            _ => {}
        }
    }

    /// A path as seen from a cell's folder.
    fn near(&self, path: &Path) -> PathBuf {
        match path.strip_prefix(&self.root) {
            Ok(inside) => Path::new("../..").join(inside),
            Err(_) => path.to_path_buf(),
        }
    }

    /// Notes where variants are given more values to choose among than others.
    fn budgets(&mut self, points: &[Point]) {
        let Some(tune) = self.spec.tune.as_deref() else { return };
        let mut tried: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for point in points {
            if let (Some(label), Some(value)) =
                (label_on(point, &self.compare), label_on(point, tune))
            {
                let values = tried.entry(label).or_default();
                if !values.contains(&value) {
                    values.push(value);
                }
            }
        }
        let mut by_count: BTreeMap<usize, Vec<&str>> = BTreeMap::new();
        for (label, values) in &tried {
            by_count.entry(values.len()).or_default().push(label);
        }
        if by_count.len() > 1 {
            let parts: Vec<String> = by_count
                .iter()
                .map(|(count, labels)| format!("{count} for {}", labels.join(", ")))
                .collect();
            self.notes.push(format!("Unequal tuning budgets ({tune}): {}.", parts.join("; ")));
        }
    }
}

/// A point's label on an axis.
fn label_on<'a>(point: &'a Point, axis: &str) -> Option<&'a str> {
    point.labels.iter().find(|(name, _)| name == axis).map(|(_, label)| label.as_str())
}

/// Labels in words.
pub(crate) fn shown(labels: &BTreeMap<String, String>) -> String {
    labels.iter().map(|(axis, label)| format!("{axis} {label}")).collect::<Vec<_>>().join(", ")
}

/// The value at a dotted key of a recipe.
fn at(recipe: &Value, key: &str) -> Value {
    let step = |value: &Value, part: &str| match value {
        Value::Array(items) => part
            .parse::<usize>()
            .ok()
            .and_then(|index| items.get(index))
            .cloned()
            .unwrap_or_default(),
        other => other.get(part).cloned().unwrap_or_default(),
    };
    key.split('.').fold(recipe.clone(), |value, part| step(&value, part))
}

/// A value without entries that say nothing (null, false, an empty list or mapping): an option that a later
/// version of the program adds does not give old cells another name as long as it is not used.
fn without_empty(value: &Value) -> Value {
    let says = |value: &Value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
        _ => true,
    };
    match value {
        Value::Object(map) => {
            let kept = map.iter().map(|(key, value)| (key.clone(), without_empty(value)));
            let mut kept: Vec<(String, Value)> = kept.filter(|(_, value)| says(value)).collect();
            // In a fixed order, whatever that of the options is.
            kept.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(Map::from_iter(kept))
        }
        Value::Array(items) => Value::Array(items.iter().map(without_empty).collect()),
        other => other.clone(),
    }
}

/// The folder of a cell.
pub(crate) fn cell_folder(root: &Path, id: &str) -> PathBuf {
    root.join(CELLS).join(id)
}

/// The recipe of a cell.
pub(crate) fn recipe_path(root: &Path, id: &str) -> PathBuf {
    cell_folder(root, id).join(RECIPE)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A trained cell on the axes `method` and `train.learning_rate`.
    pub(crate) fn cell(method: &str, rate: &str, seed: u64) -> Planned {
        let labels = [("method", method), ("train.learning_rate", rate)];
        Planned {
            id: format!("{method}-{rate}-{seed}"),
            labels: labels.map(|(axis, label)| (axis.to_owned(), label.to_owned())).into(),
            seed: Some(seed),
            kind: Kind::Trained,
            parameters: Some(1000),
            sources: Vec::new(),
        }
    }

    /// A plan of such cells, its rate tuned.
    pub(crate) fn plan(cells: Vec<Planned>) -> Plan {
        let labels = |axis: &str| {
            let mut labels: Vec<String> = Vec::new();
            for cell in &cells {
                if !labels.contains(&cell.labels[axis]) {
                    labels.push(cell.labels[axis].clone());
                }
            }
            (axis.to_owned(), labels)
        };
        Plan {
            format: FORMAT,
            name: "example".to_owned(),
            title: "Example".to_owned(),
            question: None,
            axes: vec![labels("method"), labels("train.learning_rate")],
            compare: "method".to_owned(),
            reference: None,
            tune: Some("train.learning_rate".to_owned()),
            select: "valid_loss".to_owned(),
            metrics: Vec::new(),
            paper: None,
            keep: Keep::All,
            notes: Vec::new(),
            cells,
        }
    }

    #[test]
    fn what_says_nothing_gives_no_other_name() {
        let old = json!({"b": 1, "a": {"x": [1, {"y": null}]}});
        let new = json!({"a": {"x": [1, {"y": null}], "new": false}, "b": 1, "newer": []});
        assert_eq!(without_empty(&old).to_string(), without_empty(&new).to_string());
        assert_ne!(without_empty(&old), without_empty(&json!({"b": 2})));
        assert_eq!(at(&json!({"a": [{"b": 3}]}), "a.0.b"), json!(3));
    }
}
