//! What a cell gave, as `result.json` holds it.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// A cell's results. Names and meaning of the fields are documented in `docs/studies.md` and stay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CellResult {
    /// Version of the format.
    pub format: u32,
    /// The cell.
    pub cell: String,
    /// The program that made it, with its version.
    pub program: String,
    /// All that decided the result, as in `cell.json`.
    pub identity: Value,
    /// What training gave; none for cells that are not trained.
    pub trained: Option<Validated>,
    /// The scores on the test split; none until the cell is chosen and scored.
    pub test: Option<Measured>,
    /// Where it ran.
    pub machine: Machine,
    /// How often it was begun or taken over.
    pub attempts: u64,
    /// Seconds that the study itself took around the cell's commands.
    pub overhead_s: f64,
    /// What `hydralora analyze` finds in the adapter, or the reason why it is not here.
    pub analysis: Value,
}

/// What training a cell gave.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Validated {
    /// Held-out loss on the validation split, after training.
    pub valid: Option<Losses>,
    /// The base model's.
    pub base: Option<Losses>,
    /// How training ended: `finished` or `earlystopped`.
    pub ending: String,
    /// Optimizer steps.
    pub steps: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Those of them that carried a label.
    pub label_tokens: u64,
    /// Seconds of training, pauses left out.
    pub wall_s: f64,
    /// Processor seconds of the commands, those of attempts that were cut short too as far as known.
    pub cpu_s: Option<f64>,
    /// Largest resident memory, in MB.
    pub peak_rss_mb: Option<f64>,
    /// Joules, and how they were read.
    pub energy: Energy,
    /// Trainable parameters by kind.
    pub parameters: Parameters,
    /// Mean gates, if the adapter routes.
    pub gates: Option<Gates>,
    /// Loss by step, thinned out.
    pub curve: Vec<CurvePoint>,
    /// Held-out loss and routers by step.
    pub evaluations: Vec<EvaluationPoint>,
}

/// A loss in nats per label token.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Losses {
    /// Over all label tokens.
    pub loss: f64,
    /// How many there are.
    pub label_tokens: u64,
    /// By domain.
    pub domains: BTreeMap<String, DomainLoss>,
}

/// A domain's loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DomainLoss {
    /// In nats per label token.
    pub loss: f64,
    /// Label tokens.
    pub label_tokens: u64,
}

/// Energy, and how it was read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Energy {
    /// Joules; none where nothing could be read.
    pub energy_j: Option<f64>,
    /// Where they were read.
    pub source: Option<String>,
    /// Why there are none, or what is not counted or counted too much.
    pub reason: Option<String>,
    /// Power of the idle machine before the work, where it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_watts: Option<f64>,
    /// Grams of CO2 equivalent, where the grid's intensity was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub g_co2eq: Option<f64>,
}

impl Energy {
    /// Whether a part of it is a guess that nobody measured.
    pub fn is_estimate(&self) -> bool {
        self.source.as_ref().is_some_and(|source| source.contains("estimate: "))
    }
}

impl Default for Energy {
    fn default() -> Self {
        let reason = "nothing was measured";
        let reason = Some(reason.to_owned());
        Self { energy_j: None, source: None, reason, idle_watts: None, g_co2eq: None }
    }
}

/// Parameters by kind.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Parameters {
    /// Of the base model.
    pub base: u64,
    /// Down-projections.
    pub a: u64,
    /// Up-projections.
    pub b: u64,
    /// Routers.
    pub router: u64,
    /// Learned factors.
    pub scale: u64,
    /// Virtual tokens and what makes them.
    pub prompt: u64,
    /// Weights of the model itself.
    pub weights: u64,
    /// All that are trained.
    pub trainable: u64,
    /// Those, in percent of all.
    pub percent: f64,
}

/// Mean gates by layer and domain.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Gates {
    /// The domains, in the order of the second index.
    pub domains: Vec<String>,
    /// `[layer][domain][expert]`, the mean over the layer's routed projections.
    pub layers: Vec<Vec<Vec<f64>>>,
}

/// A training step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    /// Its number.
    pub step: u64,
    /// Training loss.
    pub loss: f64,
}

/// An evaluation during training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EvaluationPoint {
    /// After which step.
    pub step: u64,
    /// Held-out loss.
    pub valid_loss: f64,
    /// Mean entropy of the gates over the entropy of equal ones, 0 to 1.
    pub gate_entropy: Option<f64>,
    /// Largest difference between two domains in the share of an expert, mean over layers.
    pub gate_spread: Option<f64>,
    /// Distance of the routers' weights from their start over the start's norm.
    pub router_movement: Option<f64>,
}

/// Scores on the test split.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Task or group → metric, named as lm-evaluation-harness names them (`acc,none`, `acc_stderr,none`),
    /// of loss tasks also `label_tokens`.
    pub tasks: BTreeMap<String, BTreeMap<String, Value>>,
    /// Task → metric without its filter → whether more is better.
    pub higher_is_better: BTreeMap<String, BTreeMap<String, bool>>,
    /// Task → data file → SHA-256.
    pub data_sha256: BTreeMap<String, Value>,
    /// Seconds of scoring.
    pub wall_s: f64,
    /// Processor seconds of scoring.
    pub cpu_s: Option<f64>,
    /// Joules of scoring.
    pub energy: Energy,
}

/// Where a cell ran.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's name.
    pub processor: Option<String>,
    /// Threads it was run with.
    pub threads: u64,
    /// Operating system and architecture.
    pub system: String,
}

/// The name of the mean loss over all `loss:` tasks, weighed by label tokens.
pub const LOSS: &str = "loss";

/// The mean over the domains of all `loss:` tasks, where there are several.
pub const MACRO_LOSS: &str = "macro_loss";

/// What keys of the weights' measures begin with.
pub const ANALYSIS: &str = "analysis";

impl CellResult {
    /// The keys of the measures of the weights that there are.
    pub fn weight_metrics(&self) -> Vec<String> {
        let overall = self.analysis.get("overall").and_then(Value::as_object);
        let numbers = overall.into_iter().flatten().filter(|(_, value)| value.is_number());
        numbers.map(|(name, _)| format!("{ANALYSIS}/{name}")).collect()
    }

    /// The number under a key: `valid_loss`, `valid_loss/DOMAIN`, `base_loss`, `base_loss/DOMAIN`,
    /// `parameters`, `wall_s`, `cpu_s`, `peak_rss_mb`, `energy_j`, `tokens`, `steps`; `loss`, `loss/DOMAIN`
    /// and `macro_loss` (the mean over domains) of the test split, `test_wall_s`, `test_energy_j`; `analysis/MEASURE` of the
    /// weights; `TASK/METRIC` of any other task, or `TASK` for its first metric.
    pub fn metric(&self, key: &str) -> Option<f64> {
        let (head, part) = match key.split_once('/') {
            Some((head, part)) => (head, Some(part)),
            None => (key, None),
        };
        let of_losses = |losses: &Losses| match part {
            None => Some(losses.loss),
            Some(domain) => losses.domains.get(domain).map(|domain| domain.loss),
        };
        let trained = self.trained.as_ref();
        match head {
            "valid_loss" => trained?.valid.as_ref().and_then(of_losses),
            "base_loss" => trained?.base.as_ref().and_then(of_losses),
            "parameters" => Some(trained?.parameters.trainable as f64),
            "wall_s" => Some(trained?.wall_s),
            "cpu_s" => trained?.cpu_s,
            "peak_rss_mb" => trained?.peak_rss_mb,
            "energy_j" => trained?.energy.energy_j,
            "tokens" => Some(trained?.tokens as f64),
            "steps" => Some(trained?.steps as f64),
            "test_energy_j" => self.test.as_ref()?.energy.energy_j,
            "test_wall_s" => Some(self.test.as_ref()?.wall_s),
            ANALYSIS => self.analysis.get("overall")?.get(part?)?.as_f64(),
            LOSS => self.test.as_ref()?.loss(part),
            MACRO_LOSS => self.test.as_ref()?.macro_loss(),
            task => self.test.as_ref()?.score(task, part),
        }
        .filter(|value| value.is_finite())
    }

    /// Every test metric there is, by key.
    pub fn test_metrics(&self) -> BTreeMap<String, f64> {
        let mut found = BTreeMap::new();
        let Some(test) = &self.test else { return found };
        found.extend(test.loss(None).map(|loss| (LOSS.to_owned(), loss)));
        found.extend(test.macro_loss().map(|loss| (MACRO_LOSS.to_owned(), loss)));
        for (task, metrics) in &test.tasks {
            if let Some(domain) = domain_of(task) {
                found
                    .extend(test.loss(Some(domain)).map(|loss| (format!("{LOSS}/{domain}"), loss)));
                continue;
            }
            // The loss of all domains, which is there already.
            if task == LOSS {
                continue;
            }
            for (name, value) in metrics {
                let score = is_score(name).then(|| value.as_f64()).flatten();
                found.extend(score.map(|value| (format!("{task}/{name}"), value)));
            }
        }
        found
    }

    /// Whether more of a metric is better.
    pub fn higher_is_better(&self, key: &str) -> bool {
        let (task, metric) = key.split_once('/').unwrap_or((key, ""));
        let name = metric.split(',').next().unwrap_or_default();
        let of_task = self.test.as_ref().and_then(|test| test.higher_is_better.get(task));
        match of_task.and_then(|metrics| metrics.get(name).or_else(|| metrics.values().next())) {
            Some(higher) => *higher,
            None => !is_cost(key),
        }
    }
}

/// Whether less of it is better, as far as the name says.
pub(crate) fn is_cost(key: &str) -> bool {
    let head = key.split('/').next().unwrap_or(key);
    let costs = [
        "parameters",
        "wall_s",
        "test_wall_s",
        "cpu_s",
        "peak_rss_mb",
        "energy_j",
        "test_energy_j",
    ];
    head.ends_with("loss") || costs.contains(&head)
}

/// The domain of a task of held-out loss.
fn domain_of(task: &str) -> Option<&str> {
    task.strip_prefix("loss_")
}

/// Whether an entry of a task's results is a score, and not its error, name or size.
fn is_score(name: &str) -> bool {
    name.contains(',') && !name.contains("_stderr,")
}

impl Measured {
    fn loss(&self, domain: Option<&str>) -> Option<f64> {
        let of = |metrics: &BTreeMap<String, Value>| {
            let weight = metrics.get("label_tokens").and_then(Value::as_f64).unwrap_or(1.0);
            Some((metrics.get("loss,none")?.as_f64()?, weight))
        };
        if let Some(domain) = domain {
            return self.tasks.get(&format!("loss_{domain}")).and_then(of).map(|(loss, _)| loss);
        }
        let all = self.tasks.iter().filter(|(task, _)| domain_of(task).is_some());
        let all: Vec<(f64, f64)> = all.filter_map(|(_, metrics)| of(metrics)).collect();
        let weight: f64 = all.iter().map(|(_, weight)| weight).sum();
        (weight > 0.0).then(|| all.iter().map(|(loss, w)| loss * w).sum::<f64>() / weight)
    }

    fn macro_loss(&self) -> Option<f64> {
        let domains: Vec<f64> =
            self.tasks.keys().filter_map(|task| self.loss(Some(domain_of(task)?))).collect();
        crate::stats::mean(&domains).filter(|_| domains.len() > 1)
    }

    fn score(&self, task: &str, metric: Option<&str>) -> Option<f64> {
        let metrics = self.tasks.get(task)?;
        let found = match metric {
            Some(metric) => metrics.get(metric).or_else(|| metrics.get(&format!("{metric},none"))),
            None => metrics.iter().find(|(name, _)| is_score(name)).map(|(_, value)| value),
        };
        found?.as_f64()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::json;

    /// A result with a validation loss and a test loss.
    pub(crate) fn result(cell: &str, valid: f64, test: Option<f64>) -> CellResult {
        let losses = |loss: f64| Losses {
            loss,
            label_tokens: 100,
            domains: [("law".to_owned(), DomainLoss { loss, label_tokens: 100 })].into(),
        };
        CellResult {
            format: crate::store::FORMAT,
            cell: cell.to_owned(),
            program: "hydralora test".to_owned(),
            identity: Value::Null,
            trained: Some(Validated {
                valid: Some(losses(valid)),
                base: Some(losses(3.0)),
                ending: "finished".to_owned(),
                steps: 10,
                tokens: 1000,
                label_tokens: 500,
                wall_s: 12.5,
                parameters: Parameters { trainable: 1234, ..Parameters::default() },
                ..Validated::default()
            }),
            test: test.map(|loss| Measured {
                tasks: [
                    // A group, as evaluation adds it; its score is computed from its members.
                    ("loss".to_owned(), [("loss,none".to_owned(), json!(9.0))].into()),
                    (
                        "loss_law".to_owned(),
                        [
                            ("loss,none".to_owned(), json!(loss)),
                            ("label_tokens".to_owned(), json!(30)),
                        ]
                        .into(),
                    ),
                    (
                        "loss_math".to_owned(),
                        [
                            ("loss,none".to_owned(), json!(loss + 1.0)),
                            ("label_tokens".to_owned(), json!(10)),
                        ]
                        .into(),
                    ),
                    (
                        "mmlu".to_owned(),
                        [
                            ("acc,none".to_owned(), json!(0.25)),
                            ("acc_stderr,none".to_owned(), json!(0.1)),
                            ("alias".to_owned(), json!("mmlu")),
                        ]
                        .into(),
                    ),
                ]
                .into(),
                higher_is_better: [("mmlu".to_owned(), [("acc".to_owned(), true)].into())].into(),
                ..Measured::default()
            }),
            machine: Machine::default(),
            attempts: 1,
            overhead_s: 0.01,
            analysis: Value::Null,
        }
    }

    #[test]
    fn metrics_have_keys() {
        let result = result("a", 2.0, Some(1.0));
        for (key, value) in [
            ("valid_loss", 2.0),
            ("valid_loss/law", 2.0),
            ("base_loss", 3.0),
            ("parameters", 1234.0),
            ("loss", 1.25),
            ("loss/math", 2.0),
            ("macro_loss", 1.5),
            ("mmlu", 0.25),
            ("mmlu/acc", 0.25),
            ("mmlu/acc,none", 0.25),
        ] {
            assert_eq!(result.metric(key), Some(value), "{key}");
        }
        assert_eq!(result.metric("mmlu/f1"), None);
        assert_eq!(result.metric("valid_loss/code"), None);
        let keys: Vec<String> = result.test_metrics().into_keys().collect();
        assert_eq!(keys, ["loss", "loss/law", "loss/math", "macro_loss", "mmlu/acc,none"]);
        assert!(result.higher_is_better("mmlu") && !result.higher_is_better("loss/law"));
        assert!(!result.higher_is_better("valid_loss") && !result.higher_is_better("wall_s"));
    }
}
