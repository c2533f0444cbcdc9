// Bundle app.jsx with Grafana's components for a browser.
import * as esbuild from 'esbuild';
import { fileURLToPath } from 'node:url';
import path from 'node:path';

const here = path.dirname(fileURLToPath(import.meta.url));
const [out] = process.argv.slice(2);

// Packages of CommonJS whose default export is the component; Grafana imports them as modules.
const interop = {
  name: 'interop',
  setup(build) {
    const packages = ['react-custom-scrollbars-2', 'rc-slider', 'rc-cascader', 'react-highlight-words',
      'react-loading-skeleton', 'react-calendar', 'react-table'];
    build.onResolve({ filter: new RegExp(`^(${packages.join('|')})$`) }, (one) => (
      one.pluginData?.inner ? undefined : { path: one.path, namespace: 'interop' }));
    build.onLoad({ filter: /.*/, namespace: 'interop' }, async (one) => {
      const found = await build.resolve(one.path, { kind: 'require-call', resolveDir: here, pluginData: { inner: true } });
      return { resolveDir: here, loader: 'js', contents: `const found = require(${JSON.stringify(found.path)});
        module.exports = found?.__esModule && found.default !== undefined ? Object.assign(found.default, found) : found;` };
    });
  },
};

await esbuild.build({
  entryPoints: [path.join(here, 'app.jsx')], outfile: out, bundle: true, format: 'iife', platform: 'browser',
  nodePaths: [path.join(here, 'node_modules')], jsx: 'automatic', logLevel: 'error', minify: true,
  define: { 'process.env.NODE_ENV': '"production"', global: 'window' },
  loader: Object.fromEntries(['.svg', '.png', '.woff', '.woff2', '.ttf'].map((kind) => [kind, 'dataurl'])),
  mainFields: ['browser', 'module', 'main'], conditions: ['import', 'module', 'browser'], plugins: [interop],
});
