// What Grafana's Prometheus data source asks: variables, annotations and panels, over a real Prometheus.
'use strict';

const POINTS = 400; // as on a panel of half a screen

class Source {
  constructor({ url, from, to, scrape }) {
    Object.assign(this, { url, from, to, scrape, cache: new Map() });
    this.forget();
  }

  // Another board has other variables.
  forget() { this.values = {}; }

  async api(path, query) {
    const url = new URL(this.url + path);
    for (const [name, value] of Object.entries(query)) url.searchParams.append(name, value);
    const key = String(url);
    if (!this.cache.has(key)) {
      const answer = await (await fetch(url)).json();
      this.cache.set(key, answer);
    }
    const answer = this.cache.get(key);
    if (answer.status !== 'success') throw new Error(answer.error);
    return answer.data;
  }

  step(points, interval) {
    const least = interval ? parseInt(interval, 10) : this.scrape;
    return Math.max(least, Math.ceil((this.to - this.from) / (points ?? POINTS) / least) * least);
  }

  fillIn(text, step) {
    const builtIn = {
      __rate_interval: `${Math.max(step + this.scrape, 4 * this.scrape)}s`, __interval: `${step}s`,
      __interval_ms: step * 1000, __range: `${this.to - this.from}s`,
    };
    return text.replace(/\$\{?(\w+)\}?/g, (whole, name) => {
      const value = builtIn[name] ?? this.values[name];
      if (value === undefined) throw new Error(`unknown variable ${whole}`);
      return value;
    });
  }

  async variable(variable) {
    if (variable.type === 'datasource') { this.values[variable.name] = 'prometheus'; return ['prometheus']; }
    const query = this.fillIn(variable.query.query, this.step());
    const [, selector, label] = /^label_values\((?:(.*),\s*)?(\w+)\)$/s.exec(query) ?? [];
    if (!label) throw new Error(`not a query that is understood here: ${query}`);
    const found = await this.api(`/api/v1/label/${label}/values`, { 'match[]': selector, start: this.from, end: this.to });
    this.values[variable.name] = variable.includeAll ? variable.allValue : found[0] ?? '';
    return found;
  }

  async events(annotation) {
    const step = Math.max(parseInt(annotation.step, 10), this.scrape);
    const query = this.fillIn(annotation.expr, step);
    const data = await this.api('/api/v1/query_range', { query, start: this.from, end: this.to, step });
    if (!annotation.useValueForTime) throw new Error('expected the value to be the time');
    const title = (metric) => annotation.titleFormat.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, name) => metric[name] ?? '');
    const events = data.result.flatMap(({ metric, values }) => values.map(([, value]) => `${title(metric)}@${value}`));
    return [...new Set(events)].sort();
  }

  async target(panel, target) {
    if (target.range === target.instant) throw new Error('neither or both of range and instant');
    const step = this.step(panel.maxDataPoints, panel.interval);
    const query = this.fillIn(target.expr, step);
    const aligned = (time) => Math.floor(time / step) * step;
    const data = target.instant
      ? await this.api('/api/v1/query', { query, time: this.to })
      : await this.api('/api/v1/query_range', { query, start: aligned(this.from), end: aligned(this.to), step });
    return data.result;
  }
}

module.exports = { Source };
